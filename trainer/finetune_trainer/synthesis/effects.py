"""The values that items exchange with the code that runs them: an item yields effects and receives replies.

So a method is written as one conversation after the other, independent of whether a thousand of them run concurrently
against a server or in batches with a local model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.queries.result import QueryResult


@dataclass(frozen=True)
class Ask:
    """A request to the teacher."""

    request: ChatRequest


@dataclass(frozen=True)
class Execute:
    """A query on the item's database."""

    query: str


@dataclass(frozen=True)
class Failed:
    """A failed effect: `reason` is one of `reasons`, `detail` describes the failure."""

    reason: str
    detail: str


Effect = Ask | Execute
Reply = ChatAnswer | QueryResult | Failed


@dataclass(frozen=True)
class Made:
    """A row of the result, before rows are compared with each other."""

    messages: tuple[Mapping[str, str], ...]
    instruction: str
    """The text by which duplicates are found."""
    columns: Mapping[str, Any]
    """Other columns of the row."""
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A rejected row and the reason."""

    reason: str
    example: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


Outcome = Made | Rejected
Work = Generator[Effect, Reply, list[Outcome]]


@dataclass(frozen=True)
class Item:
    """A unit of work: a chunk, a seed, or a set of pairs. Items are independent of each other."""

    name: str
    work: Callable[[], Work]
