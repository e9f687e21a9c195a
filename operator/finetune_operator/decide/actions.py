"""Actions and events that a decision may contain (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal


@dataclass(frozen=True)
class StartRun:
    """Create a run's objects; creating them again changes nothing."""

    run: int
    avoid: tuple[str, ...] = ()
    """Names of nodes that its pods must not run on."""
    rather_not: tuple[str, ...] = ()
    """Names of nodes that its pods use only if no other node fits."""


@dataclass(frozen=True)
class StopRun:
    """Ask a run's driver to save a checkpoint and stop."""

    run: int


@dataclass(frozen=True)
class DeleteRun:
    """Delete a run; its pods get their grace period."""

    run: int
    engine: str
    """The engine that runs it, which may differ from the engine of the current spec and settings."""


@dataclass(frozen=True)
class AbandonRun:
    """Delete a run without waiting for its pods, whose node does not answer: its name is free at once."""

    run: int
    engine: str
    """See `DeleteRun.engine`."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the FineTuneJob itself; the garbage collector deletes its objects."""


@dataclass(frozen=True)
class HoldJob:
    """Add the finalizer to the job, or remove it."""

    hold: bool


@dataclass(frozen=True)
class MarkCheckpoint:
    """Annotate the main object of a run and its pods with the last checkpoint."""

    run: int
    engine: str
    """See `DeleteRun.engine`."""
    annotations: dict[str, str]
    main: bool
    """Whether the main object lacks them."""
    pods: tuple[str, ...]
    """Names of the pods that lack them."""


Action = StartRun | StopRun | DeleteRun | AbandonRun | DeleteJob | HoldJob | MarkCheckpoint


@dataclass(frozen=True)
class Event:
    """A Kubernetes event about the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """The result of `decide`: the new status, the actions to apply before it, events, and when to reconcile again."""

    status: dict[str, Any]
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    wake: datetime | None = None
    urgent: bool = False
    """Whether the status differs in more than progress and is therefore written at once."""
