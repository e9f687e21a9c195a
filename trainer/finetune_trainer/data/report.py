"""Counts of data preparation, for the job's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from torch.utils.data import IterableDataset

from finetune_trainer.data.data_identity import DataKey

Json = dict[str, Any]


@dataclass(frozen=True)
class DataReport:
    """Counts of the training part; `eval_rows` and `eval_tokens` count the prepared held-out part."""

    rows: int
    """Training rows of the table; for text, documents."""
    kept: int
    """Rows with at least one trained token after truncation and dropping (`split` counts each piece)."""
    tokens: int
    """Tokens kept, prompts included."""
    trained_tokens: int
    """Tokens that carry loss in one pass."""
    truncated_examples: int
    truncated_tokens: int
    """Tokens cut off from examples that were kept."""
    dropped: dict[str, int]
    """Dropped rows by reason."""
    dropped_tokens: int
    """Tokens of dropped rows; for text, the ends of shards that did not fill a block."""
    longest: int
    """Tokens of the longest example before truncation; for a pair, the longer side with its prompt."""
    packed_rows: int | None
    """Rows after packing (text: blocks); None if nothing is packed."""
    packing_efficiency: float | None
    """Share of the packed rows' length that holds tokens."""
    max_length: int | None
    """The length limit; None if the model has none."""
    eval_rows: int
    eval_tokens: int
    bytes: int
    """Stored bytes of the tokenized rows."""
    seconds: float
    """Time of the original preparation."""
    tokens_per_second: float
    cached: bool = False
    """Whether an earlier preparation was reused."""
    streaming: bool = False
    """Whether the data is read during training; counts are then zero."""
    forms: dict[str, int] = field(default_factory=dict)
    """Number of rows of each form (`form.Form`); for a stream, of its first rows."""
    notes: dict[str, int] = field(default_factory=dict)
    """Warnings about rows that are trained on, with the number of rows."""

    def to_json(self) -> Json:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> DataReport:
        """Return the report from the values of `to_json`."""
        return cls(**values)


@dataclass(frozen=True)
class Prepared:
    """Datasets for a trainer. `prepare` documents the columns."""

    train: Dataset | IterableDataset[Json]
    eval: Dataset | None
    report: DataReport
    key: DataKey


@dataclass
class Stats:
    """Counts of one task; they are added up in order of the tasks."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_examples: int = 0
    truncated_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tokens: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    written: int = 0
    """Rows written, after packing."""
    too_long: list[tuple[int, int]] = field(default_factory=list)
    """Row and length of each example over the limit, if that is an error."""
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason of each row that can't be tokenized."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of rows by warning."""

    def add(self, other: Stats) -> None:
        """Add the counts of another task."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)

    def note(self, notes: Iterable[str]) -> None:
        """Count the warnings about a row."""
        self.notes.update(notes)

    def drop(self, reason: str, tokens: int) -> None:
        """Count a dropped row."""
        self.dropped[reason] += 1
        self.dropped_tokens += tokens
