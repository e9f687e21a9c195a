"""What this process is doing and whether it gets on: read by a thread that tells the driver.

Two kinds of phases. In a *measured* one (a training step, a wait for other workers) only `beat` and a change of phase
are progress: a worker that waits inside NCCL spins, so its CPU time says nothing. In any other one (loading, saving,
merging, compiling, downloading) the CPU time and the bytes read and written are progress too, so that no long phase has
to report each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What a process does."""

    name: str
    measured: bool = False
    """Whether only beats are progress."""
    waits: bool = False
    """Whether it waits for other workers, so that it is not the one behind."""
    step: int = 0
    """Optimizer steps done before it."""
    order: int = 0
    """Place of the phase within its step: the worker with the lowest step and place is behind the others."""


IDLE = Phase("starting")


class Pulse:
    """The pulse of one process. Phases belong to the thread that trains; any thread may beat."""

    def __init__(self) -> None:
        self.beats = 0
        self.phase = IDLE

    def beat(self) -> None:
        """Something was done."""
        self.beats += 1

    def enter(self, phase: Phase) -> None:
        """Begin a phase, which lasts until the next one."""
        self.phase = phase
        self.beats += 1


_pulse = Pulse()


def pulse() -> Pulse:
    """Return this process's pulse."""
    return _pulse


def beat() -> None:
    """Say that something was done: a batch measured, a token generated, an answer or a part of a file received."""
    _pulse.beat()


@contextmanager
def during(
    name: str, *, measured: bool = False, waits: bool = False, step: int | None = None, order: int | None = None
) -> Iterator[None]:
    """Inside, the process does what `name` says. Step and place are those of the phase around it where not given."""
    before = _pulse.phase
    where = (before.step if step is None else step, before.order if order is None else order)
    _pulse.enter(Phase(name, measured, waits, *where))
    try:
        yield
    finally:
        _pulse.enter(before)


def enter(name: str, *, measured: bool = False, step: int | None = None, order: int | None = None) -> None:
    """Begin a phase that ends where the next one begins."""
    before = _pulse.phase
    where = (before.step if step is None else step, before.order if order is None else order)
    _pulse.enter(Phase(name, measured, False, *where))
