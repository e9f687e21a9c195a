"""Sampling whose every draw is a row's own: the same whatever shares its batch, and on every device."""

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
    """Uniform numbers from 0 to below 1, shape (rows, steps), each row's by the seed and the row's two numbers."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, *row]).random(steps) for row in rows]))


class SeededSampling(LogitsProcessor):
    """Leaves of each row the one token that its number draws, so that greedy decoding takes it.

    A token is drawn by inverting the distribution function, which needs one number a token: transformers' own
    sampling takes as many from one global stream as the whole batch has, so its answers change with the batch.
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
        """Scores of shape (rows, vocabulary): 0 for the drawn token and -inf for all others."""
        warped = self.warpers(input_ids, scores)
        reached = warped.softmax(-1, dtype=torch.float64).cumsum(-1)
        number = self.numbers[:, self.step, None].to(scores.device)
        self.step += 1
        drawn = torch.searchsorted(reached, number * reached[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)  # type: ignore[return-value]
