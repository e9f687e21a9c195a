"""Call the rewards of a stage, check their values, and combine them."""

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
    """Its name in metrics, unique in the stage."""
    function: RewardFunction
    weight: float
    where: str
    """Its path in the job, such as `stages[2].rlhf.rewards[0]`."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """Return a number for each completion, or None where the function returns None.

        Raises:
            UserError: the function returns something else.
        """
        result = self.function(prompts=prompts, completions=completions, **columns)
        values = asyncio.run(result) if inspect.iscoroutine(result) else result
        if len(values) != len(completions):
            raise UserError([Problem(self.where, f"returned {len(values)} rewards for {len(completions)} completions")])
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError([Problem(self.where, f"returned {value!r} for a completion, expected a number or None")])
        return number


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the rows' columns for reward functions, one entry per row, None if a row lacks the column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def weighted(values: list[list[float | None]], weights: list[float]) -> list[float | None]:
    """Return each completion's weighted sum over the rewards with a number for it; None if no reward has one.

    Args:
        values: for each reward, one entry per completion.
    """
    sums = []
    for answer in zip(*values, strict=True):
        known = [value * weight for value, weight in zip(answer, weights, strict=True) if value is not None]
        sums.append(sum(known) if known else None)
    return sums
