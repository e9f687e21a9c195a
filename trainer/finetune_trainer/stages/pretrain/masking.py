"""BERT's masking with new masks in each epoch, reproducible when a run resumes."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast


class MaskingCollator:
    """Masked-LM collator of transformers (80% mask, 10% random, 10% kept; arXiv 1810.04805) with reproducible masks.

    transformers' masks depend on the number of batches drawn before, which a resumed run cannot restore because the
    loader prefetches. Here they depend on the batch's tokens, the seed and the epoch only.

    A batch has `input_ids`, `attention_mask` and `labels`, int64 [B, T]; labels of unmasked tokens are -100.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, probability: float, seed: int) -> None:
        self._inner = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability, seed=seed)
        self.seed = seed
        self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "labels" in rows[0]:
            return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        self._inner.generator = torch.Generator().manual_seed(self._seed_of(rows))
        return dict(self._inner.torch_call([{"input_ids": row["input_ids"]} for row in rows]))

    def mask_rows(self, batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """Return the masked columns of a batch of blocks, as a function for `datasets.map`."""
        masked = self([{"input_ids": ids} for ids in batch["input_ids"]])
        return {name: values.tolist() for name, values in masked.items()}

    def _seed_of(self, rows: list[dict[str, Any]]) -> int:
        content = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
        return zlib.crc32(content.numpy().tobytes()) ^ (self.seed * 2_654_435_761 + self.epoch * 40_503)
