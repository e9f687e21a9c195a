"""The making of data as values: an item's work asks for effects, and whoever drives it gives the replies.

So a method reads as one conversation after the other, and neither knows nor cares whether a thousand of them are under
way at a server, or one batch after the other in a local model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.queries.result import QueryResult


@dataclass(frozen=True)
class Ask:
    """Ask the teacher."""

    request: ChatRequest


@dataclass(frozen=True)
class Execute:
    """Run a query on the item's database."""

    query: str


@dataclass(frozen=True)
class Failed:
    """There is no reply: `reason` is one of few, `detail` says what happened."""

    reason: str
    detail: str


Effect = Ask | Execute
Reply = ChatAnswer | QueryResult | Failed


@dataclass(frozen=True)
class Made:
    """A row of the result, so far as it stands alone."""

    messages: tuple[Mapping[str, str], ...]
    instruction: str
    """What makes the row another one than the others: duplicates are told by it."""
    columns: Mapping[str, Any]
    """Further columns of the row."""
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Rejected:
    """What became no row, and why."""

    reason: str
    example: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


Outcome = Made | Rejected
Work = Generator[Effect, Reply, list[Outcome]]


@dataclass(frozen=True)
class Item:
    """One piece of the whole: a chunk, a seed, a set of pairs. Items depend on nothing but themselves."""

    name: str
    work: Callable[[], Work]
