"""Hashes that identify the data of a stage, so that a resumed stage can check that it has the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataKey:
    """The identity of a stage's data. Equal `train` means equal training rows; other fields explain a difference."""

    train: str
    """Hash of the training rows' tokens; for a stream, hash of its sources and of the encoding settings."""
    eval: str | None
    """Hash of the held-out rows' tokens; None if there are none."""
    rows: int | None
    """Number of training rows; None for a stream."""
    tokenizer: str
    template: str
    """Hash of the chat template."""
    encoding: str
    """Hash of the encoding settings: the kind of rows, lengths, packing."""
    version: int
    """`cache_keys.FORMAT_VERSION`, the version of this package's preparation."""


def changes(before: dict[str, Any], now: DataKey) -> list[str]:
    """Return the differences in training data since a checkpoint was saved; empty if the rows are the same.

    Args:
        before: fields of the checkpoint's `DataKey`.
    """
    if before.get("train") == now.train:
        return []
    causes = {
        "tokenizer": "another tokenizer",
        "template": "another chat template",
        "encoding": "other lengths or another packing",
        "version": "another version of finetune, which prepares rows differently",
    }
    found = [text for name, text in causes.items() if before.get(name) != getattr(now, name)]
    if not found or before.get("rows") != now.rows:
        counts = "" if now.rows is None else f" ({before.get('rows')} then, {now.rows} now)"
        found.insert(0, f"other rows{counts}")
    return found
