"""The rewards of a stage together: each one's number for every answer, checked."""

from __future__ import annotations

import asyncio
import inspect
import math
from dataclasses import dataclass
from typing import Any

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.rewards.functions import RewardFunction


@dataclass(frozen=True)
class NamedReward:
    """One reward of a stage."""

    name: str
    """Its name in metrics, the stage's only one of that name."""
    function: RewardFunction
    weight: float
    where: str
    """Its place in the job, such as `stages[2].rlhf.rewards[0]`."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """A number for each answer, None where the function has none.

        Raises:
            UserError: the function gives something else.
        """
        given = self.function(prompts=prompts, completions=completions, **columns)
        values = asyncio.run(given) if inspect.iscoroutine(given) else given
        if len(values) != len(completions):
            raise UserError([Problem(self.where, f"gave {len(values)} rewards for {len(completions)} answers")])
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError([Problem(self.where, f"gave {value!r} for an answer, expected a number or None")])
        return number


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns for reward functions, one entry per row, None where a row has no such column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def weighted(values: list[list[float | None]], weights: list[float]) -> list[float | None]:
    """Each answer's sum over the rewards that have a number for it; None where none has.

    Args:
        values: for each reward, one entry per answer.
    """
    sums = []
    for answer in zip(*values, strict=True):
        known = [value * weight for value, weight in zip(answer, weights, strict=True) if value is not None]
        sums.append(sum(known) if known else None)
    return sums
