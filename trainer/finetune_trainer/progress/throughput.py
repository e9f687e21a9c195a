"""Measures throughput. Pure: it receives clock values, so that tests need not wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW = 20


@dataclass(frozen=True)
class Rates:
    """The rates after a step. None means not known yet."""

    seconds: float
    """Seconds of training since the stage's start, including earlier attempts, without pauses."""
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    seconds_per_step: float | None = None

    def eta(self, remaining_steps: int) -> float | None:
        """Return the seconds of further steps at the current rate; None if there is no rate."""
        return None if self.seconds_per_step is None else self.seconds_per_step * max(remaining_steps, 0)


@dataclass(frozen=True)
class _Sample:
    seconds: float
    step: int
    tokens: int
    samples: int


class Meter:
    """Measures tokens/s and samples/s over a sliding window of steps.

    Times are seconds of any monotonic clock; step, tokens and samples are cumulative since the stage's start. `pause`
    and `resume` exclude evaluation and saving. The first step after a start is slow (allocation, compilation), so it is
    dropped once two later steps are known.
    """

    def __init__(self, window: int = WINDOW, seconds: float = 0.0) -> None:
        self._window = window
        self._before = seconds
        self._since: float | None = None
        self._samples: deque[_Sample] = deque()
        self._warm = False

    def start(self, now: float, step: int = 0, tokens: int = 0, samples: int = 0) -> None:
        """Begin training, in a resumed run at `step`."""
        self._since = now
        self._warm = False
        self._samples = deque([_Sample(self._before, step, tokens, samples)])

    def pause(self, now: float) -> None:
        """Stop the clock. A second pause does nothing."""
        self._before = self.seconds(now)
        self._since = None

    def resume(self, now: float) -> None:
        """Start the clock after a pause. Without a pause it does nothing."""
        if self._since is None:
            self._since = now

    def seconds(self, now: float) -> float:
        """Return the seconds of training until `now`."""
        return self._before + (now - self._since if self._since is not None else 0.0)

    def update(self, now: float, step: int, tokens: int, samples: int) -> Rates:
        """Return the rates after a step. A first update without a start only begins the window."""
        self._samples.append(_Sample(self.seconds(now), step, tokens, samples))
        self._drop_old()
        return self._rates(now)

    def to_state(self, now: float) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"seconds": self.seconds(now)}

    @classmethod
    def from_state(cls, state: dict[str, Any], window: int = WINDOW) -> Meter:
        """Return the meter of a resumed run, on which `start` must be called. An empty state is that of a new run."""
        return cls(window, float(state.get("seconds", 0.0)))

    def _drop_old(self) -> None:
        if not self._warm and len(self._samples) == 3:
            self._samples.popleft()
            self._warm = True
        oldest = self._samples[-1].step - self._window
        while len(self._samples) > 2 and self._samples[0].step < oldest:
            self._samples.popleft()

    def _rates(self, now: float) -> Rates:
        first, last = self._samples[0], self._samples[-1]
        seconds, steps = last.seconds - first.seconds, last.step - first.step
        if seconds <= 0 or steps <= 0:
            return Rates(self.seconds(now))
        return Rates(
            seconds=self.seconds(now),
            tokens_per_second=(last.tokens - first.tokens) / seconds,
            samples_per_second=(last.samples - first.samples) / seconds,
            seconds_per_step=seconds / steps,
        )
