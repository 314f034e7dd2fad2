"""What every stage uses: params, the list of trainings, files, errors, process setup, records for MLflow."""
