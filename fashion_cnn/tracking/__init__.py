"""What writes runs into MLflow; no stage imports it."""
