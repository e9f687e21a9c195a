"""Evaluation of models, with a gate (`evaluate`)."""
