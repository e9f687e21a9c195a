"""Texts from outside as the page shows them: cleaned, shortened, and what they are JSON of where they are no text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.progress.formatting import clean

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


@dataclass(frozen=True)
class Turn:
    """One message of a prompt."""

    role: str
    """Empty where the prompt is a plain text."""
    text: Excerpt
    asked: bool
    """Whether it is what the answer answers: the last user's message, or the whole of a plain text."""


def turns(prompt: Any) -> list[Turn]:
    """Return a prompt's messages in order; a prompt that is no conversation is one turn, and None is none."""
    if not _is_conversation(prompt):
        text = excerpt(prompt)
        return [] if text is None else [Turn("", text, asked=True)]
    last = max((at for at, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    return [
        Turn(clean(as_text(message["role"])), excerpt(_said(message)) or Excerpt(""), asked=at == last)
        for at, message in enumerate(prompt)
    ]


def as_text(value: Any) -> str:
    """A string as it is, messages turn by turn, anything else as JSON."""
    if isinstance(value, str):
        return value
    if _is_conversation(value):
        return "\n\n".join(f"{as_text(message['role'])}: {_said(message)}" for message in value)
    return json.dumps(value, ensure_ascii=False)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value) and bool(value)


def _said(message: dict[str, Any]) -> str:
    """Return a message's text and, as JSON, what else is in it: parts that are no text, and calls of tools."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    calls = [call.get("function", call) if isinstance(call, dict) else call for call in _list(message, "tool_calls")]
    return "\n".join(as_text(one) for one in [*texts, *calls] if one is not None)


def _list(message: dict[str, Any], name: str) -> list[Any]:
    value = message.get(name)
    return value if isinstance(value, list) else []
