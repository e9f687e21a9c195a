"""How long each worker works at a step by itself, and which node is slower than the others.

Workers that train together take equally long for a step, since the fast ones wait. What differs is the time from where
a step begins to where its last backward pass, and with it the exchange of gradients, begins. Under ZeRO-3 the forward
pass exchanges weights too, so that a slow worker shows less there.
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
"""Steps whose median counts."""
LEAST = 5
SLOW = 1.5
"""A node is slow where its workers take so many times as long as those of the other nodes."""
LEAST_SECONDS = 0.01
"""A smaller difference is noise."""


@dataclass(frozen=True)
class Spread:
    """Seconds of a step's own work, over all workers."""

    median: float
    most: float
    node: str | None = None
    """The slow node, where there is one."""
    factor: float | None = None
    """How many times as long its workers take as those of the other nodes."""


class StepTimes:
    """The clock of one worker.

    Args:
        accelerator: whether it computes on a GPU, whose kernels run after Python has gone on: events in its stream are
            read later, without a wait.
    """

    def __init__(self, accelerator: bool) -> None:
        self._accelerator = accelerator
        self._began: Any = None
        self._parts: list[tuple[Any, Any]] = []
        self._steps: list[list[tuple[Any, Any]]] = []
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """A step begins, with the loading of its rows."""
        self._parts, self._began = [], self._mark()

    def leave_out(self, accelerator: Any) -> None:
        """Leave out what the workers exchange within a step, such as its number of tokens and TRL's metrics, and their
        waits for each other in it."""
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
        """The last backward pass of the step begins."""
        self._stop()
        if self._parts:
            self._steps.append(self._parts)
            self._parts = []

    def own(self) -> float | None:
        """Return the median seconds of the last steps; None before there are enough. Every step until now is over."""
        self._seconds.extend(sum(self._between(*part) for part in parts) for parts in self._steps)
        self._steps = []
        return median(self._seconds) if len(self._seconds) >= LEAST else None

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self._accelerator else last - first

    def _mark(self) -> Any:
        if not self._accelerator:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def spread(seconds: Sequence[float], hosts: Sequence[str]) -> Spread:
    """Return how the workers' own times differ.

    Args:
        seconds: of each worker, by rank.
        hosts: the name of each worker's node, by rank.
    """
    of_nodes = {host: median(one for one, at in zip(seconds, hosts, strict=True) if at == host) for host in hosts}
    slowest = max(of_nodes, key=lambda host: of_nodes[host])
    others = [value for host, value in of_nodes.items() if host != slowest]
    found = Spread(median(seconds), max(seconds))
    if not others:
        return found
    usual = median(others)
    if of_nodes[slowest] - usual < LEAST_SECONDS or of_nodes[slowest] < SLOW * usual:
        return found
    return Spread(found.median, found.most, slowest, of_nodes[slowest] / max(usual, 1e-9))
