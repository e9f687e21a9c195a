"""Kahneman-Tversky optimization (`kto`)."""
