"""What preparation did, in numbers that a report can show."""

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
    """Counts are of the training part; `eval_rows` and `eval_tokens` are of the held-out part, as trained on."""

    rows: int
    """Rows of the table that are for training: for text, documents."""
    kept: int
    """Rows that have at least one token to learn after cutting and dropping (`split` counts each of its pieces)."""
    tokens: int
    """Tokens kept, prompts included."""
    trained_tokens: int
    """Tokens that carry loss in one pass."""
    truncated_examples: int
    truncated_tokens: int
    """Tokens cut off from examples that were kept."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    dropped_tokens: int
    """Tokens of rows left out; for text, the ends of shards that did not fill a block."""
    longest: int
    """Tokens of the longest example before cutting; of a pair, the longer side with its prompt."""
    packed_rows: int | None
    """Rows after packing (text: blocks); None where nothing is packed."""
    packing_efficiency: float | None
    """Share of the packed rows' length that holds tokens."""
    max_length: int | None
    """The limit that was applied; None where the model has none."""
    eval_rows: int
    eval_tokens: int
    bytes: int
    """Bytes of the rows tokenised, as stored."""
    seconds: float
    """Time that preparation took when it was done."""
    tokens_per_second: float
    cached: bool = False
    """Whether an earlier preparation was found."""
    streaming: bool = False
    """Whether the data is read while training: counts are then zero."""
    forms: dict[str, int] = field(default_factory=dict)
    """Rows of each form (`form.Form`); of a stream, of the rows that it begins with."""
    notes: dict[str, int] = field(default_factory=dict)
    """What the user has to know about rows that train all the same, and of how many rows it holds."""

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Json) -> DataReport:
        return cls(**values)


@dataclass(frozen=True)
class Prepared:
    """Data as a trainer takes it. Columns are in `prepare`'s docstring."""

    train: Dataset | IterableDataset[Json]
    eval: Dataset | None
    report: DataReport
    key: DataKey


@dataclass
class Stats:
    """Counts of one task, added up in order of the tasks."""

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
    """Row and length of examples over the limit, where that is an error."""
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason, where a row can't be tokenised."""
    notes: Counter[str] = field(default_factory=Counter)
    """Rows by what the user has to know about them."""

    def add(self, other: Stats) -> None:
        """Add another's counts to these."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)

    def note(self, notes: Iterable[str]) -> None:
        """Count what the user has to know about a row."""
        self.notes.update(notes)

    def drop(self, reason: str, tokens: int) -> None:
        """Count a row left out."""
        self.dropped[reason] += 1
        self.dropped_tokens += tokens
