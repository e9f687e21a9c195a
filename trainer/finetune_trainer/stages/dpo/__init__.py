"""Direct preference optimization (`dpo`)."""
