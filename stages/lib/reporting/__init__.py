"""What a stage reports to MLflow, and what ties a run to its code and machine."""
