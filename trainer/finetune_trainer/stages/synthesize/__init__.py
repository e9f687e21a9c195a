"""Synthetic data from a teacher (`synthesize`)."""
