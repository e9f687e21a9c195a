"""Measures the time that each worker needs for a step by itself, and finds the node that is slower than the others.

Workers that train together take equally long for a step, because fast ones wait. The time that differs is that from the
begin of a step to the begin of its last backward pass, which exchanges gradients. Under ZeRO-3 the forward pass
exchanges weights too, so that a slow worker is less visible.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

WINDOW = 20
"""Number of steps of the median."""
LEAST = 5
"""Number of steps that are needed."""
SLOW = 1.5
"""A node is slow if its workers take this many times as long as those of the other nodes."""
LEAST_SECONDS = 0.01
"""A smaller difference is noise."""


@dataclass(frozen=True)
class Spread:
    """The distribution of step times over all workers, in seconds."""

    median: float
    most: float
    node: str | None = None
    """Name of the slow node; None if there is none."""
    factor: float | None = None
    """Ratio of the step time of its workers to that of the other nodes."""


class StepTimes:
    """Measures the step times of one worker.

    Args:
        accelerator: whether it uses a GPU, whose kernels run asynchronously: CUDA events are recorded and read later,
            without synchronisation.
    """

    def __init__(self, accelerator: bool) -> None:
        self._accelerator = accelerator
        self._began: Any = None
        self._parts: list[tuple[Any, Any]] = []
        self._steps: list[list[tuple[Any, Any]]] = []
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """Record the begin of a step, which first loads its rows."""
        self._parts, self._began = [], self._mark()

    def leave_out(self, accelerator: Any) -> None:
        """Exclude collective operations within a step, such as those of token counts and TRL's metrics."""
        for name in ("gather", "gather_for_metrics", "reduce"):
            setattr(accelerator, name, self._paused(getattr(accelerator, name)))

    def _paused(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            running = self._began is not None
            self._stop()
            try:
                return exchange(*args, **kwargs)
            finally:
                if running:
                    self._began = self._mark()

        return timed

    def _stop(self) -> None:
        if self._began is not None:
            self._parts.append((self._began, self._mark()))
            self._began = None

    def exchange(self) -> None:
        """Record the begin of the last backward pass of a step."""
        self._stop()
        if self._parts:
            self._steps.append(self._parts)
            self._parts = []

    def own(self) -> float | None:
        """Return the median of the last steps in seconds, or None if there are too few. All steps must have ended."""
        self._seconds.extend(sum(self._between(*part) for part in parts) for parts in self._steps)
        self._steps = []
        return median(self._seconds) if len(self._seconds) >= LEAST else None

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000 if self._accelerator else float(last - first)

    def _mark(self) -> Any:
        if not self._accelerator:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def spread(seconds: Sequence[float], hosts: Sequence[str]) -> Spread:
    """Return the distribution of step times, with the slow node if there is one.

    Args:
        seconds: step time of each worker, by rank.
        hosts: name of each worker's node, by rank.
    """
    by_node = {host: median(one for one, at in zip(seconds, hosts, strict=True) if at == host) for host in hosts}
    slowest = max(by_node, key=lambda host: by_node[host])
    others = [value for host, value in by_node.items() if host != slowest]
    overall = Spread(median(seconds), max(seconds))
    if not others:
        return overall
    usual = median(others)
    if by_node[slowest] - usual < LEAST_SECONDS or by_node[slowest] < SLOW * usual:
        return overall
    return Spread(overall.median, overall.most, slowest, by_node[slowest] / max(usual, 1e-9))
