"""The code that writes runs into MLflow; no stage imports it."""
