"""A run's objects as manifests: pure functions of the job, the run's number and the settings."""
