"""Detects bad losses and gradient norms by comparison with those of earlier steps. Pure: it does no I/O.

There are two kinds. The update of a step whose loss or norm is not finite would ruin the model. A finite value far
above the others may be the beginning of a divergence or one unusual batch: the caller decides by how long it lasts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WINDOW = 64
"""Number of good steps with which a step is compared."""
LEAST = 24
"""Number of good steps that are needed before a finite value can be bad."""
SPREADS = 10.0
"""Robust z-score of a spike: its distance from the median in units of 1.4826 MAD, which is one standard deviation of
normally distributed values (Rousseeuw and Croux 1993)."""
LEAST_EXCESS = 1.0
"""Minimum distance of a spike from the median in nats per token. If a loss hardly changes, MAD is almost 0."""
EXPLOSION = 10.0
"""Ratio of an exploding gradient norm to the largest one of the window."""
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Finding:
    """The reason why a step is bad."""

    text: str
    finite: bool
    """Whether loss and norm are finite. If not, the update would ruin the model."""


@dataclass
class LossMonitor:
    """Checks the steps of one stage, in order.

    Args:
        watch_level: whether to check for spikes of the loss, which must be a mean over tokens. The losses of preference
            and reinforcement learning are heavy-tailed: one hard pair is far above the median of easy ones.
        clip: the stage's `maxGradNorm`. A norm below it never counts as an explosion; 0: gradients are not clipped.
        warmup: optimizer steps of the learning rate's warm-up, in which finite values are never bad.
    """

    watch_level: bool
    clip: float
    warmup: int
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def check(self, step: int, loss: float, norm: float | None) -> Finding | None:
        """Return why a step is bad, or None if it is good. A good step is added to the window.

        Args:
            step: optimizer steps done before.
            loss: mean over all workers.
            norm: gradient norm over all workers, before clipping; None if unknown.
        """
        found = self._not_finite(loss, norm) or (self._outlier(loss, norm) if step >= self.warmup else None)
        if found is None:
            self.losses.append(loss)
            if norm is not None:
                self.norms.append(norm)
        return found

    def to_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, so that a resumed run decides as an uninterrupted one."""
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
    """Return a message if a loss is far above the earlier ones, else None."""
    values = list(before)
    middle = median(values)
    deviation = _MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    if loss - middle <= max(SPREADS * deviation, LEAST_EXCESS):
        return None
    score = f", {(loss - middle) / deviation:.3g} robust standard deviations" if deviation else ""
    return f"the loss is {loss:.4g}, {loss - middle:.3g} above the median {middle:.4g} of the last steps{score}"
