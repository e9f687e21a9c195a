"""The kinds of rows that stages train on, one module each, which normalises and tokenizes rows.

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
"""The columns of a tokenized row."""
IGNORED = -100
"""Label of a token without loss."""
TOO_LONG, NOTHING, IDENTICAL = "too long", "nothing to learn", "identical pair"
UNANSWERED = "no assistant turn"
"""Reasons why rows are dropped."""


@dataclass(frozen=True)
class RowKind:
    """Functions and settings of one kind of rows."""

    needed: str
    """The columns that a row needs, as text for messages."""
    normalise: Callable[[Fields], Example]
    """Returns a row in the kind's normal form.

    Raises:
        FormError: the row has another form.
        EmptyRow: the row has nothing to train on.
    """
    encode: Callable[[Encoder, int, Example, Stats], Iterator[Columns]] | None = None
    """Yields the tokenized rows of one example, and counts it in `Stats`. None: examples are texts, which are
    concatenated and cut into blocks."""
    pairs: Literal["no", "yes", "only"] = "no"
    """Whether a row may (`yes`) or must (`only`) be a pair of a chosen and a rejected answer."""
    needs_answer: bool = True
    """Whether a row without an answer has nothing to train on."""
    limit_field: str = "maxLength"
    """The stage's field that limits the length of a row."""
    rows: str = "examples"
    """Name of the rows in messages."""
    overflow_hint: str = "Set maxLength up to the model's context to cut them, or overflow: truncate, drop"
    """Hint to the user on rows that are too long."""

    @property
    def joined(self) -> bool:
        """Whether rows are texts that are concatenated and cut into blocks."""
        return self.encode is None


@cache
def row_kind(name: str) -> RowKind:
    """Return the kind of rows with this name.

    Raises:
        LookupError: there is no such kind.
    """
    known = sorted(module.name for module in iter_modules(__path__))
    if name not in known:
        raise LookupError(f"unknown kind of rows {name!r}: expected one of {', '.join(known)}")
    kind: RowKind = import_module(f"{__name__}.{name}").KIND
    return kind
