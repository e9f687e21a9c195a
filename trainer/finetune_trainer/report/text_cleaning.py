"""Clean and shorten values for the report page; values that are not text are shown as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.progress.formatting import clean

SHORT_TEXT = 1_200
"""Characters of a sample that are shown before it is expanded."""
LONGEST_TEXT = 100_000
"""Maximum number of characters of a sample on the page."""


@dataclass(frozen=True)
class Excerpt:
    """A text and its shortened form; `whole` is empty if `short` is complete."""

    short: str
    whole: str = ""
    length: int = 0
    cut: bool = False
    """Whether `whole` is shortened, too."""


def excerpt(value: Any) -> Excerpt | None:
    """Return a sample as shortened text: a string, a list of messages or any JSON value; None for None."""
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
    """Empty if the prompt is plain text."""
    text: Excerpt
    asked: bool
    """Whether the answer responds to this turn: the last user message, or a plain text."""


def turns(prompt: Any) -> list[Turn]:
    """Return the messages of a prompt in order: one turn if it is not a conversation, none if it is None."""
    if not _is_conversation(prompt):
        text = excerpt(prompt)
        return [] if text is None else [Turn("", text, asked=True)]
    last = max((at for at, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    return [
        Turn(clean(as_text(message["role"])), excerpt(_said(message)) or Excerpt(""), asked=at == last)
        for at, message in enumerate(prompt)
    ]


def as_text(value: Any) -> str:
    """Return a string unchanged, messages turn by turn, and anything else as JSON."""
    if isinstance(value, str):
        return value
    if _is_conversation(value):
        return "\n\n".join(f"{as_text(message['role'])}: {_said(message)}" for message in value)
    return json.dumps(value, ensure_ascii=False)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value) and bool(value)


def _said(message: dict[str, Any]) -> str:
    """Return the content and the tool calls of a message as text; parts that are not text become JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    calls = [call.get("function", call) if isinstance(call, dict) else call for call in _list(message, "tool_calls")]
    return "\n".join(as_text(one) for one in [*texts, *calls] if one is not None)


def _list(message: dict[str, Any], name: str) -> list[Any]:
    value = message.get(name)
    return value if isinstance(value, list) else []
