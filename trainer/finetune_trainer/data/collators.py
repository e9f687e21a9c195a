"""Batches from prepared rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

Rows = list[dict[str, Any]]
IGNORED = -100


@dataclass
class PackedCollator:
    """Packed rows as a batch [B, max_length] of int64 `input_ids`, `labels` and `position_ids`, and no attention mask.

    Positions start again at 0 with each document, the padding being a document of its own. transformers reads the
    documents off the positions (`masking_utils.find_packed_sequence_indices`, for any B) and keeps them apart, with
    eager and sdpa attention alike, but only where no attention mask and no cache is given: call with `use_cache=False`.
    """

    pad_token_id: int
    max_length: int

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        return {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": self._pad([row["labels"] for row in rows], IGNORED),
            "position_ids": torch.stack([self._positions(row["seq_lengths"]) for row in rows]),
        }

    def _pad(self, values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([[*value, *[filler] * (self.max_length - len(value))] for value in values])

    def _positions(self, lengths: list[int]) -> Tensor:
        padding = self.max_length - sum(lengths)
        return torch.cat([torch.arange(length) for length in [*lengths, padding]])


@dataclass
class PreferenceCollator:
    """TRL's `DataCollatorForPreference` with masks of our own: in its `completion_mask` [2B, L] (chosen rows first,
    then rejected) the turns of a user after the prompt are 0, where TRL counts every token after the prompt."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Rows) -> dict[str, Any]:
        collator = DataCollatorForPreference(self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        batch: dict[str, Any] = collator(rows)
        mask = torch.zeros_like(batch["completion_mask"])
        for side, name in enumerate(("chosen_mask", "rejected_mask")):
            for number, row in enumerate(rows):
                start, values = len(row["prompt_ids"]), row[name]
                mask[side * len(rows) + number, start : start + len(values)] = torch.tensor(values)
        return {**batch, "completion_mask": mask}
