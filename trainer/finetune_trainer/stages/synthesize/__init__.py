"""Synthetic data generation by a teacher model (`synthesize`)."""
