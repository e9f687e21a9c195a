"""A chat completion request and its answer as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_api.generation import Generation

Messages = tuple[Mapping[str, str], ...]

CHARACTERS_PER_TOKEN = 4
"""For English text with common tokenizers; used only for estimates."""
MESSAGE_TOKENS = 8
"""Approximate tokens that a chat template adds to a message."""


@dataclass(frozen=True)
class ChatRequest:
    """A request to a model. `sample` distinguishes otherwise equal requests."""

    messages: Messages
    generation: Generation = field(default_factory=Generation)
    structured: bool = False
    """Whether the answer must be one JSON object; the messages ask for it, too."""
    sample: int = 0

    def key(self, model: str) -> str:
        """Return a key that is equal for equal requests to the same model, in any process."""
        parts = [model, [dict(message) for message in self.messages], self.generation.to_json()]
        text = json.dumps([*parts, self.structured, self.sample], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def prompt_tokens(self) -> int:
        """Return an estimate of the prompt's tokens; the exact number depends on the server's tokenizer."""
        characters = sum(len(message["content"]) for message in self.messages)
        return characters // CHARACTERS_PER_TOKEN + MESSAGE_TOKENS * (len(self.messages) + 1)


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to a request. Token counts are the server's; None if it sent none."""

    text: str
    finish: str = ""
    """`finish_reason` of the server: `stop`, `length`, `content_filter` or another one."""
    model: str = ""
    """The model's name from the server, often more exact than the requested one."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChatAnswer:
        """Return the answer from the values of `to_json`; unknown fields are ignored."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


class BadBody(ValueError):
    """A response of status 200 that is not a chat completion."""


def read_answer(body: bytes) -> ChatAnswer:
    """Return the first choice of a response's body.

    Raises:
        BadBody: the body is not JSON, or has no choice with a text.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"a body that is not JSON ({error})") from error
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadBody("a body without choices")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise BadBody("a choice without a message")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise BadBody("a message whose content is not a string")
    usage = value.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return ChatAnswer(
        # JSON may hold lone surrogates, which can't be written as UTF-8.
        text=(text or "").encode("utf-8", "replace").decode(),
        finish=str(choices[0].get("finish_reason") or ""),
        model=str(value.get("model") or ""),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
