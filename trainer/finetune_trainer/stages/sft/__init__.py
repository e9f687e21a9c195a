"""Supervised fine-tuning (`sft`)."""
