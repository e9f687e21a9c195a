"""The throughput meter: pure, fed with clock values, so that it is tested without waiting."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW = 20


@dataclass(frozen=True)
class Rates:
    """What the meter knows after a step; None means: not known yet."""

    seconds: float
    """Seconds trained since the stage's start: earlier attempts included, pauses left out."""
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    seconds_per_step: float | None = None

    def eta(self, remaining_steps: int) -> float | None:
        """Seconds that so many further steps take at the present rate; None where there is no rate."""
        return None if self.seconds_per_step is None else self.seconds_per_step * max(remaining_steps, 0)


@dataclass(frozen=True)
class _Mark:
    seconds: float
    step: int
    tokens: int
    samples: int


class Meter:
    """Tokens/s and samples/s over a sliding window of steps.

    Times are seconds of any monotonic clock; step, tokens and samples are cumulative since the stage's start.
    Evaluation and saving are left out by `pause` and `resume`. The first step after a start is slow (allocation,
    compilation), so the rates forget it as soon as two later ones are known.
    """

    def __init__(self, window: int = WINDOW, seconds: float = 0.0) -> None:
        self._window = window
        self._before = seconds
        self._since: float | None = None
        self._marks: deque[_Mark] = deque()
        self._warm = False

    def start(self, now: float, step: int = 0, tokens: int = 0, samples: int = 0) -> None:
        """Training begins or, in a resumed run, goes on at `step`."""
        self._since = now
        self._warm = False
        self._marks = deque([_Mark(self._before, step, tokens, samples)])

    def pause(self, now: float) -> None:
        """What follows is not training; a second pause does nothing."""
        self._before = self.seconds(now)
        self._since = None

    def resume(self, now: float) -> None:
        """Training goes on; without a pause before it this does nothing."""
        if self._since is None:
            self._since = now

    def seconds(self, now: float) -> float:
        """Seconds trained up to `now`."""
        return self._before + (now - self._since if self._since is not None else 0.0)

    def update(self, now: float, step: int, tokens: int, samples: int) -> Rates:
        """The rates after `step`; a first update without a start only begins the window."""
        self._marks.append(_Mark(self.seconds(now), step, tokens, samples))
        self._forget()
        return self._rates(now)

    def to_state(self, now: float) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"seconds": self.seconds(now)}

    @classmethod
    def from_state(cls, state: dict[str, Any], window: int = WINDOW) -> Meter:
        """The meter of a resumed run; call `start` on it. An empty state is that of a new run."""
        return cls(window, float(state.get("seconds", 0.0)))

    def _forget(self) -> None:
        if not self._warm and len(self._marks) == 3:
            self._marks.popleft()
            self._warm = True
        oldest = self._marks[-1].step - self._window
        while len(self._marks) > 2 and self._marks[0].step < oldest:
            self._marks.popleft()

    def _rates(self, now: float) -> Rates:
        first, last = self._marks[0], self._marks[-1]
        seconds, steps = last.seconds - first.seconds, last.step - first.step
        if seconds <= 0 or steps <= 0:
            return Rates(self.seconds(now))
        return Rates(
            seconds=self.seconds(now),
            tokens_per_second=(last.tokens - first.tokens) / seconds,
            samples_per_second=(last.samples - first.samples) / seconds,
            seconds_per_step=seconds / steps,
        )
