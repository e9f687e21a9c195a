"""The result or the failure of a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Engine = Literal["sqlite", "duckdb", "cypher"]
FailureKind = Literal["invalid", "not read-only", "timeout", "memory", "crash"]


@dataclass(frozen=True)
class QueryResult:
    """The rows of a query as JSON values: decimals are numbers, and other values without a JSON type are text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    more: bool
    """Whether there are more rows than these."""


class QueryFailed(Exception):
    """A query without a result: `kind` is the kind of failure, the message the reason."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind

    def __reduce__(self) -> tuple[type[QueryFailed], tuple[FailureKind, str]]:
        return type(self), (self.kind, str(self))
