"""Tokenizer training (`tokenizer`)."""
