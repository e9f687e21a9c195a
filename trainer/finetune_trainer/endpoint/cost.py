"""Compute the cost of answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.endpoint import Endpoint
from finetune_trainer.endpoint.chat import ChatAnswer

MILLION = 1_000_000


@dataclass(frozen=True)
class Cost:
    """The tokens of answers, and their price if the endpoint's prices are known."""

    answers: int
    prompt_tokens: int
    completion_tokens: int
    uncounted: int = 0
    """Answers for which the server sent no token counts."""
    price: float | None = None


def cost_of(answers: Iterable[ChatAnswer], endpoint: Endpoint | None) -> Cost:
    """Return the cost of answers; without an endpoint they have no price."""
    counted, prompt, completion, uncounted = 0, 0, 0, 0
    for answer in answers:
        counted += 1
        uncounted += answer.prompt_tokens is None or answer.completion_tokens is None
        prompt += answer.prompt_tokens or 0
        completion += answer.completion_tokens or 0
    return Cost(counted, prompt, completion, uncounted, price(prompt, completion, endpoint))


def price(prompt_tokens: int, completion_tokens: int, endpoint: Endpoint | None) -> float | None:
    """Return the price of tokens; None if the endpoint has no prices."""
    if endpoint is None or (endpoint.prompt_price is None and endpoint.completion_price is None):
        return None
    total = prompt_tokens * (endpoint.prompt_price or 0.0) + completion_tokens * (endpoint.completion_price or 0.0)
    return total / MILLION
