"""How long each worker works at a step by itself, and which node is slower than the others.

Workers that train together take equally long for a step, since the fast ones wait. What differs is the time from where
a step begins to where its last backward pass, and with it the exchange of gradients, begins. Under ZeRO-3 the forward
pass exchanges weights too, so that a slow worker shows less there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
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
        self._begin: Any = None
        self._open: list[tuple[Any, Any]] = []
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """A step begins, with the loading of its rows."""
        self._begin = self._mark()

    def exchange(self) -> None:
        """The last backward pass of the step begins."""
        if self._begin is not None:
            self._open.append((self._begin, self._mark()))
            self._begin = None

    def own(self) -> float | None:
        """Return the median seconds of the last steps; None before there are enough. Every step until now is over."""
        for first, last in self._open:
            self._seconds.append(first.elapsed_time(last) / 1000 if self._accelerator else last - first)
        self._open = []
        return median(self._seconds) if len(self._seconds) >= LEAST else None

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
