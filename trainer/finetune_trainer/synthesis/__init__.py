"""Generate training data with a teacher model: its requests, and the checks that answers must pass."""
