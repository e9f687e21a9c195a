"""One request for a chat completion and its answer, as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_api.generation import Generation

Messages = tuple[Mapping[str, str], ...]

CHARACTERS_PER_TOKEN = 4
"""Of English text in the common tokenizers; only estimates use it."""
MESSAGE_TOKENS = 8
"""What a chat template adds to a message, about."""


@dataclass(frozen=True)
class ChatRequest:
    """What is asked of a model. `sample` tells apart requests that are the same otherwise."""

    messages: Messages
    generation: Generation = field(default_factory=Generation)
    structured: bool = False
    """Whether the answer is to be one JSON object; the messages say so too."""
    sample: int = 0

    def key(self, model: str) -> str:
        """The same for the same request to the same model, whenever and wherever it is asked."""
        parts = [model, [dict(message) for message in self.messages], self.generation.to_json()]
        text = json.dumps([*parts, self.structured, self.sample], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def prompt_tokens(self) -> int:
        """An estimate of the prompt's length, which no client can know without the server's tokenizer."""
        characters = sum(len(message["content"]) for message in self.messages)
        return characters // CHARACTERS_PER_TOKEN + MESSAGE_TOKENS * (len(self.messages) + 1)


@dataclass(frozen=True)
class ChatAnswer:
    """What came back. Token counts are the server's; None where it told none."""

    text: str
    finish: str = ""
    """`stop`, `length`, `content_filter` or what else the server says."""
    model: str = ""
    """The model's name in the server's words, often more exact than the one asked for."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChatAnswer:
        """The inverse of `to_json`; unknown fields are left out."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


class BadBody(ValueError):
    """A response of status 200 that is no chat completion."""


def read_answer(body: bytes) -> ChatAnswer:
    """The first choice of a response's body.

    Raises:
        BadBody: it is no JSON, or has no choice with a text.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"a body that is no JSON ({error})") from error
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadBody("a body without choices")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise BadBody("a choice without a message")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise BadBody("a message whose content is no text")
    usage = value.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return ChatAnswer(
        # JSON may hold lone surrogates, which no file takes.
        text=(text or "").encode("utf-8", "replace").decode(),
        finish=str(choices[0].get("finish_reason") or ""),
        model=str(value.get("model") or ""),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
