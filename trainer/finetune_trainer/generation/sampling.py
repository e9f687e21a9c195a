"""Sampling with separate random numbers for each row: independent of the batch and the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune_trainer.generation.options import GenerationOptions


def draws(seed: int, rows: Sequence[tuple[int, int]], steps: int) -> torch.Tensor:
    """Return uniform random numbers in [0, 1), shape (rows, steps), seeded by the seed and the two keys of each row."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, *row]).random(steps) for row in rows]))


class SeededSampling(LogitsProcessor):
    """A logits processor that keeps one sampled token per row, so that greedy decoding selects it.

    A token is sampled by inverting the cumulative distribution, which needs one random number per token. Sampling in
    transformers draws from one global generator for the whole batch, so its completions depend on the batch.
    """

    def __init__(self, options: GenerationOptions, numbers: torch.Tensor) -> None:
        self.numbers, self.step = numbers, 0
        self.warpers = LogitsProcessorList()
        if options.temperature is not None:
            self.warpers.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            self.warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None:
            self.warpers.append(TopPLogitsWarper(options.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores of shape (rows, vocabulary): 0 for the sampled token and -inf for all others."""
        warped = self.warpers(input_ids, scores)
        reached = warped.softmax(-1, dtype=torch.float64).cumsum(-1)
        number = self.numbers[:, self.step, None].to(scores.device)
        self.step += 1
        drawn = torch.searchsorted(reached, number * reached[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)  # type: ignore[return-value]
