"""Horizontal bars of one metric for several models, in plain HTML: they scale, print and use the page's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_trainer.progress.formatting import number


@dataclass(frozen=True)
class Bars:
    """A metric's value by model, the evaluated one first."""

    title: str
    values: dict[str, float]

    @property
    def shares(self) -> list[tuple[str, str, float]]:
        """Name, value and length (0 to 100) of each bar.

        Lengths are linear from 0, or logarithmic if values differ by more than 100 times, so that all are visible.
        """
        finite = [value for value in self.values.values() if math.isfinite(value)]
        return [(name, number(value), self._length(value, finite)) for name, value in self.values.items()]

    @property
    def by_logarithm(self) -> bool:
        """Whether lengths are logarithmic."""
        finite = [value for value in self.values.values() if math.isfinite(value)]
        return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 100

    def _length(self, value: float, finite: list[float]) -> float:
        if not math.isfinite(value) or not finite:
            return 100.0
        top = max(abs(one) for one in finite)
        if self.by_logarithm:
            return round(100 * math.log1p(value) / math.log1p(top), 1)
        return round(100 * abs(value) / top, 1) if top else 0.0
