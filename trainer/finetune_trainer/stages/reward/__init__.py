"""Reward models (`reward`)."""
