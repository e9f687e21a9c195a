"""Which losses and gradient norms of training steps are bad, judged by those of the steps before (pure).

Two kinds. A number that is not finite ruins the model with its update. A finite one that is far above the others may be
the beginning of a divergence, or one odd batch: the caller decides by how long it lasts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WINDOW = 64
"""Good steps that a step is compared with."""
LEAST = 24
"""Good steps that are needed before a finite number can be bad."""
SPREADS = 10.0
"""Robust z-score of a spike: distances from the median in units of 1.4826 MAD, which is one standard deviation of
normally distributed values (Rousseeuw and Croux 1993)."""
LEAST_EXCESS = 1.0
"""Nats per token that a spike lies above the median at least. Where a loss hardly changes, MAD is almost nothing."""
EXPLOSION = 10.0
"""An exploding gradient norm is so many times the largest of the window."""
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Finding:
    """What is bad about a step."""

    text: str
    finite: bool
    """Whether the numbers are finite; the update of a step whose numbers are not would ruin the model."""


@dataclass
class Judge:
    """Judges the steps of one stage in order.

    Args:
        watch_level: whether the loss is a mean over tokens, whose level can be judged. The losses of preference and
            reinforcement learning are heavy-tailed: one hard pair is far above the median of easy ones.
        clip: the stage's `maxGradNorm`. A norm below it is never an explosion; 0: gradients are not clipped.
        warmup: optimizer steps of the learning rate's warm-up, in which finite numbers are never bad.
    """

    watch_level: bool
    clip: float
    warmup: int
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def finding(self, step: int, loss: float, norm: float | None) -> Finding | None:
        """Return what is bad about a step, or None. A good step joins the window.

        Args:
            step: optimizer steps done before it.
            loss: mean over all workers.
            norm: of the gradients of all workers, before clipping; None where it is not known.
        """
        found = self._not_finite(loss, norm) or (self._outlier(loss, norm) if step >= self.warmup else None)
        if found is None:
            self.losses.append(loss)
            if norm is not None:
                self.norms.append(norm)
        return found

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: a resumed run judges as an undisturbed one."""
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.norms = deque(state.get("norms", ()), maxlen=WINDOW)

    def _not_finite(self, loss: float, norm: float | None) -> Finding | None:
        if not math.isfinite(loss):
            return Finding(f"the loss is {loss}", finite=False)
        if norm is not None and not math.isfinite(norm):
            return Finding(f"the gradient norm is {norm} (loss {loss:.4g})", finite=False)
        return None

    def _outlier(self, loss: float, norm: float | None) -> Finding | None:
        if self.watch_level and len(self.losses) >= LEAST and (above := spike(loss, self.losses)) is not None:
            return Finding(above, finite=True)
        if norm is not None and len(self.norms) >= LEAST and norm > self.clip:
            largest = max(self.norms)
            if 0 < largest * EXPLOSION < norm:
                text = f"the gradient norm is {norm:.4g}, {norm / largest:.3g} times the largest of the last steps"
                return Finding(text, finite=True)
        return None


def spike(loss: float, before: Iterable[float]) -> str | None:
    """Return how far a loss lies above those before it, or None where that is not far."""
    values = list(before)
    middle = median(values)
    deviation = _MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    if loss - middle <= max(SPREADS * deviation, LEAST_EXCESS):
        return None
    score = f", {(loss - middle) / deviation:.3g} robust standard deviations" if deviation else ""
    return f"the loss is {loss:.4g}, {loss - middle:.3g} above the median {middle:.4g} of the last steps{score}"
