"""Manifests of the objects of a run: pure functions of the job, the number of the run and the settings."""
