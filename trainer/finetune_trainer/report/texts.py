"""Texts from outside as the page shows them: cleaned, shortened, and what they are JSON of where they are no text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.progress.format import clean

SHORT_TEXT = 1_200
"""Characters of a sample that are shown at once."""
LONGEST_TEXT = 100_000
"""Characters of a sample that the page holds at all."""


@dataclass(frozen=True)
class Excerpt:
    """A text in two lengths; `whole` is empty where `short` is all of it."""

    short: str
    whole: str = ""
    length: int = 0
    cut: bool = False
    """Whether even `whole` leaves something out."""


def excerpt(value: Any) -> Excerpt | None:
    """A sample's text, shortened: a string, a list of messages or any JSON value; None where it is not given."""
    if value is None:
        return None
    text = as_text(value)
    shown = clean(text[:LONGEST_TEXT])
    if len(text) <= SHORT_TEXT:
        return Excerpt(shown)
    return Excerpt(clean(text[:SHORT_TEXT]) + "…", shown, len(text), len(text) > LONGEST_TEXT)


def as_text(value: Any) -> str:
    """A string as it is, messages turn by turn, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return json.dumps(value, ensure_ascii=False)
