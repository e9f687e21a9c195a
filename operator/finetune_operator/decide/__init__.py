"""Decisions about a job: pure functions of a snapshot. They import neither kopf nor the API client."""
