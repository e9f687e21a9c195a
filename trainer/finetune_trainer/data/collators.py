"""Collators of prepared rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Rows = list[dict[str, Any]]
IGNORED = -100


@dataclass
class PackedCollator:
    """Make a batch [B, max_length] of packed rows: int64 `input_ids`, `labels` and `position_ids`.

    Positions restart at 0 in each document; the padding is a separate document. The first token of a document has no
    label, because the token before it belongs to another document. transformers detects documents from the positions
    (`masking_utils.find_packed_sequence_indices`, for any B) and masks attention between them, with eager and sdpa,
    but only without an attention mask and a cache: call the model with `use_cache=False`.

    Args:
        padding_mask: whether batches have an int64 `attention_mask` [B, max_length], 0 for padding. Only for a model
            prepared by `model.document_masks.separate_documents`: others would ignore the documents.
    """

    pad_token_id: int
    max_length: int
    padding_mask: bool = False

    def __call__(self, rows: Rows) -> dict[str, Any]:
        documents = [self._documents(row["seq_lengths"]) for row in rows]
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in documents])
        labels = self._pad([row["labels"] for row in rows], IGNORED)
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": labels.masked_fill(positions == 0, IGNORED),
            "position_ids": positions,
        }
        if self.padding_mask:
            batch["attention_mask"] = self._pad([[1] * sum(row["seq_lengths"]) for row in rows], 0)
        return batch

    def _pad(self, values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([[*value, *[filler] * (self.max_length - len(value))] for value in values])

    def _documents(self, lengths: list[int]) -> list[int]:
        """Return the lengths of a row's documents, with its padding as the last one."""
        padding = self.max_length - sum(lengths)
        return [*lengths, padding] if padding else list(lengths)


@dataclass
class PreferenceCollator:
    """Make a batch of pairs as TRL's `DataCollatorForPreference` does, with prepared loss masks.

    The batch has int64 `input_ids`, `attention_mask` and `completion_mask` [2B, L], the chosen answers first, and
    `ref_*_logps` [B] if the rows have them. In `completion_mask`, user turns after the prompt are 0, while TRL
    counts every token after the prompt.
    """

    pad_token_id: int

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
        ids = [[*row["prompt_ids"], *row[f"{side}_ids"]] for row, side in sides]
        masks = [[0] * len(row["prompt_ids"]) + [*row[f"{side}_mask"]] for row, side in sides]
        reference = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(one) for one in ids], 0),
            "completion_mask": _padded(masks, 0),
            **{name: torch.tensor([row[name] for row in rows]) for name in reference},
        }


@dataclass
class RewardCollator:
    """Make a batch of complete texts for a reward model: int64 `input_ids` and `attention_mask` [2B, L].

    Texts are padded on the right; the chosen answers come first.
    """

    pad_token_id: int

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        ids = [[*row["prompt_ids"], *row[f"{side}_ids"]] for side in ("chosen", "rejected") for row in rows]
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(one) for one in ids], 0),
        }


def _padded(values: list[list[int]], filler: int) -> Tensor:
    return pad_sequence([torch.tensor(value) for value in values], batch_first=True, padding_value=filler)
