"""What a stage trains on, in a few hashes, by which a resumed stage can tell whether it has the same rows again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataKey:
    """What a stage trains on. Equal `train` means equal training rows; the other fields tell why it differs."""

    train: str
    """Hash of the training rows' tokens; of a stream, of its sources and of how they become tokens."""
    eval: str | None
    """Hash of the held-out rows' tokens; None where there are none."""
    rows: int | None
    """Rows read to train on; None for a stream."""
    tokenizer: str
    template: str
    """Hash of the chat template."""
    encoding: str
    """Hash of how rows become tokens: the kind of rows, lengths, packing."""
    version: int
    """`keys.FORMAT_VERSION`: of our own preparation."""


def changes(before: dict[str, Any], now: DataKey) -> list[str]:
    """Return what differs in the training rows since a checkpoint was saved; empty if they are the same rows.

    Args:
        before: fields of the `DataKey` that the checkpoint has.
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
