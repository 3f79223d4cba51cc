"""MLflow: runs, pictures and registered encoders."""
