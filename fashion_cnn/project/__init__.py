"""Code that every stage uses: params, the trainings, files, errors, process setup, records for MLflow."""
