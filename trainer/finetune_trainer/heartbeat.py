"""The heartbeat of this process: its current phase and whether it makes progress.

A thread reads it and sends it to the driver (`progress.heartbeats`). There are two kinds of phases. In a *measured* one
(a training step, a wait for other workers) only `record_progress` and a change of phase count as progress: a worker
that waits inside NCCL spins, so its CPU time proves nothing. In any other phase (loading, saving, merging, compiling,
downloading) CPU time and bytes read or written count too, so that a long phase need not report each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A phase of a process, such as `forward pass`."""

    name: str
    measured: bool = False
    """Whether only heartbeats count as progress."""
    waits: bool = False
    """Whether the process waits for other workers, so that it is not the one that is behind."""
    step: int = 0
    """Optimizer steps done before the phase."""
    order: int = 0
    """Position of the phase within its step: the worker with the lowest step and position is behind the others."""


IDLE = Phase("starting")


class Heartbeat:
    """The heartbeat of one process. Only the training thread changes the phase; any thread may record progress."""

    def __init__(self) -> None:
        self.count = 0
        self.phase = IDLE

    def record_progress(self) -> None:
        """Count one unit of work."""
        self.count += 1

    def enter_phase(self, phase: Phase) -> None:
        """Begin a phase, which lasts until the next one."""
        self.phase = phase
        self.count += 1


_heartbeat = Heartbeat()


def process_heartbeat() -> Heartbeat:
    """Return the heartbeat of this process."""
    return _heartbeat


def record_progress() -> None:
    """Record a unit of work: a batch evaluated, a token generated, a response or a part of a file received."""
    _heartbeat.record_progress()


@contextmanager
def in_phase(
    name: str, *, measured: bool = False, waits: bool = False, step: int | None = None, order: int | None = None
) -> Iterator[None]:
    """Run the block in a phase, then return to the previous one. Step and order default to those of that phase."""
    before = _heartbeat.phase
    _heartbeat.enter_phase(Phase(name, measured, waits, *_position(step, order)))
    try:
        yield
    finally:
        _heartbeat.enter_phase(before)


def enter_phase(name: str, *, measured: bool = False, step: int | None = None, order: int | None = None) -> None:
    """Begin a phase, which lasts until the next one. Step and order default to those of the current phase."""
    _heartbeat.enter_phase(Phase(name, measured, False, *_position(step, order)))


def _position(step: int | None, order: int | None) -> tuple[int, int]:
    current = _heartbeat.phase
    return (current.step if step is None else step, current.order if order is None else order)
