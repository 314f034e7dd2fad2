"""What every stage uses: params, the list of trainings, files, errors, its process, its report to MLflow."""
