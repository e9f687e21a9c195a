"""How the steps of an `online` stage fall into rounds, and which prompts and pairs belong to which. Pure."""

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
    """Optimizer steps of a round."""
    prompts: int
    """Prompts of a round."""
    rows: int
    """Prompts in all."""
    seed: int

    @property
    def total(self) -> int:
        """Optimizer steps of all rounds."""
        return self.rounds * self.steps

    def at(self, step: int) -> tuple[int, int]:
        """The round that the step after `step` steps belongs to, from 0, and its number in that round."""
        return divmod(step, self.steps)

    def prompts_of(self, number: int) -> list[int]:
        """Rows of a round, in order: where the last round left off in endless passes over the data."""
        first = number * self.prompts
        passes = range(first // self.rows, (first + self.prompts - 1) // self.rows + 1)
        drawn = torch.cat([_shuffled(self.rows, self.seed + one) for one in passes])
        start = first - passes[0] * self.rows
        found: list[int] = drawn[start : start + self.prompts].tolist()
        return found

    def pairs_of(self, number: int, step: int, count: int, batch: int) -> list[int]:
        """Which of a round's `count` pairs are trained on at one of its steps: `batch` of them, in endless passes."""
        first, seed = step * batch, self.seed * 1_000_003 + number
        passes = range(first // count, (first + batch - 1) // count + 1)
        drawn = torch.cat([_shuffled(count, seed + one) for one in passes])
        start = first - passes[0] * count
        found: list[int] = drawn[start : start + batch].tolist()
        return found


def schedule(spec: OnlineSpec, rows: int, batch: int) -> Schedule:
    """The rounds of a stage.

    Args:
        rows: prompts that are there.
        batch: pairs of one optimizer step.
    """
    prompts = min(spec.prompts_per_round or rows, rows)
    steps = math.ceil(spec.num_train_epochs * prompts / batch)
    if spec.max_steps is not None:
        steps = math.ceil(spec.max_steps / spec.rounds)
    return Schedule(spec.rounds, steps, prompts, rows, spec.seed)


def _shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
