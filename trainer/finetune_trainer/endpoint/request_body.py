"""Build request bodies with the fields that a server supports."""

from __future__ import annotations

from typing import Any

from finetune_api.endpoint import Endpoint
from finetune_trainer.endpoint.chat import ChatRequest

_SPARE = ("response_format", "seed", "top_k", "repetition_penalty", "top_p", "temperature", "stop")
"""Optional fields, which are omitted if a server refuses them."""
_LENGTH = ("max_tokens", "max_completion_tokens")


class Dialect:
    """The fields that a server supports, learned from its refusals: OpenAI-compatible servers differ."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.length = _LENGTH[0]
        self.refused: set[str] = set() if endpoint.response_format != "text" else {"response_format"}

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Return the JSON body of a request."""
        own = request.generation
        fields: dict[str, Any] = {
            "temperature": (own.temperature or 1.0) if own.do_sample else 0.0,
            "top_p": own.top_p,
            "top_k": own.top_k,
            "repetition_penalty": own.repetition_penalty if own.repetition_penalty != 1 else None,
            "stop": own.stop or None,
            "seed": request.sample,
            "response_format": {"type": "json_object"} if request.structured else None,
        }
        return {
            "model": self.endpoint.model,
            "messages": [dict(message) for message in request.messages],
            self.length: own.max_new_tokens,
            **{name: value for name, value in fields.items() if value is not None and name not in self.refused},
            **self.endpoint.extra_body,
        }

    def learn(self, sent: dict[str, Any], refusal: str) -> bool:
        """Learn from a refusal (status 400 or 422); return whether a field can be omitted or renamed for a retry."""
        if self.length in sent and self.length == _LENGTH[0] and _LENGTH[1] in refusal:
            self.length = _LENGTH[1]
            return True
        if _LENGTH[1] in refusal and self.length == _LENGTH[1] and self.length not in sent:
            return True  # another request has already learned it
        named = [name for name in _SPARE if name in sent and name in refusal and name not in self.endpoint.extra_body]
        if self.endpoint.response_format == "jsonObject":
            named = [name for name in named if name != "response_format"]
        self.refused |= set(named[:1])
        return bool(named)
