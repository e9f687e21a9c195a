"""Iterative preference tuning on the model's own completions (`online`)."""
