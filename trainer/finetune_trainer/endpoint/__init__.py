"""Requests to an OpenAI-compatible server: rate-limited, sent once each, with token counts and cost."""
