"""Answers from an OpenAI-compatible server: asked politely, paid for once, accounted for."""
