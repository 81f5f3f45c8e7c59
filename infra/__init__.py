"""Machines and files: specs, sources, the run directory, Optuna, Ray, MLflow, devices."""
