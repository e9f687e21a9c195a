"""The kinds of rows that stages train on, one module each: how a row is read, and how it becomes tokens.

A stage's spec names its kind (`row_kind`). A new kind is a new module here whose `KIND` is a `RowKind`.
The modules import neither torch nor transformers, so that a job's data can be checked without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields
    from finetune_trainer.data.encode import Encoder
    from finetune_trainer.data.report import Stats

Example = dict[str, Any]
"""A row in the normal form of its kind."""
Columns = dict[str, Any]
"""A row as tokens."""
IGNORED = -100
"""Label of a token that has no loss."""
TOO_LONG, NOTHING, IDENTICAL = "too long", "nothing to learn", "identical pair"
UNANSWERED = "no assistant turn"
"""Why rows are dropped."""


@dataclass(frozen=True)
class RowKind:
    """How rows of one kind are read and encoded."""

    needed: str
    """The columns that a row needs, for messages."""
    normalise: Callable[[Fields], Example]
    """Returns a row in the kind's normal form.

    Raises:
        FormError: the row has another form.
        EmptyRow: the row has nothing to train on.
    """
    encode: Callable[[Encoder, int, Example, Stats], Iterator[Columns]] | None = None
    """Yields the rows of tokens that one example makes, and counts it in `Stats`. None: examples are texts, which are
    joined and cut into blocks."""
    pairs: Literal["no", "yes", "only"] = "no"
    """Whether a row may be a pair of a chosen and a rejected answer, or must be."""
    needs_answer: bool = True
    """Whether a row without an answer has nothing to train on."""
    limit_field: str = "maxLength"
    """The stage's field that limits the length of a row."""
    rows: str = "examples"
    """The rows' name in messages."""
    overflow_hint: str = "Set maxLength up to the model's context to cut them, or overflow: truncate, drop"
    """How a user makes rows that are too long fit."""

    @property
    def joined(self) -> bool:
        """Whether rows are texts that are joined and cut into blocks."""
        return self.encode is None


@cache
def row_kind(name: str) -> RowKind:
    """Return the kind of rows of this name.

    Raises:
        LookupError: there is no such kind.
    """
    known = sorted(module.name for module in iter_modules(__path__))
    if name not in known:
        raise LookupError(f"unknown kind of rows {name!r}: expected one of {', '.join(known)}")
    kind: RowKind = import_module(f"{__name__}.{name}").KIND
    return kind
