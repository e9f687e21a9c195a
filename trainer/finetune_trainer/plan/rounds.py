"""Schedule of the rounds of an `online` stage: their steps, prompts and pairs, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from finetune_api.stages import OnlineSpec


@dataclass(frozen=True)
class Schedule:
    """Rounds of equal length."""

    rounds: int
    steps: int
    """Optimizer steps per round."""
    prompts: int
    """Prompts per round."""
    rows: int
    """Prompts in the data."""
    seed: int

    @property
    def total(self) -> int:
        """Optimizer steps of all rounds."""
        return self.rounds * self.steps

    def at(self, step: int) -> tuple[int, int]:
        """Return the round of optimizer step `step`, and the step's index in that round; all count from 0."""
        return divmod(step, self.steps)

    def prompts_of(self, number: int) -> list[int]:
        """Return the rows of a round, in order. Rounds continue through shuffled epochs over the data."""
        first = number * self.prompts
        passes = range(first // self.rows, (first + self.prompts - 1) // self.rows + 1)
        drawn = torch.cat([_shuffled(self.rows, self.seed + one) for one in passes])
        start = first - passes[0] * self.rows
        found: list[int] = drawn[start : start + self.prompts].tolist()
        return found

    def pairs_of(self, number: int, step: int, count: int, batch: int) -> list[int]:
        """Return the `batch` pairs of a step, out of the round's `count` pairs, in shuffled epochs over them."""
        first, seed = step * batch, self.seed * 1_000_003 + number
        passes = range(first // count, (first + batch - 1) // count + 1)
        drawn = torch.cat([_shuffled(count, seed + one) for one in passes])
        start = first - passes[0] * count
        found: list[int] = drawn[start : start + batch].tolist()
        return found


def schedule(spec: OnlineSpec, rows: int, batch: int) -> Schedule:
    """Return the schedule of a stage.

    Args:
        rows: prompts in the data.
        batch: pairs per optimizer step (global batch size).
    """
    prompts = min(spec.prompts_per_round or rows, rows)
    steps = math.ceil(spec.num_train_epochs * prompts / batch)
    if spec.max_steps is not None:
        steps = math.ceil(spec.max_steps / spec.rounds)
    return Schedule(spec.rounds, steps, prompts, rows, spec.seed)


def _shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
