"""What a decision may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal


@dataclass(frozen=True)
class StartRun:
    """Make a run's objects; making them again changes nothing."""

    run: int
    avoid: tuple[str, ...] = ()
    """Names of nodes that its pods must not run on."""
    rather_not: tuple[str, ...] = ()
    """Names of nodes that its pods run on only where no other has room."""


@dataclass(frozen=True)
class StopRun:
    """Ask a run's driver to save a checkpoint and end."""

    run: int


@dataclass(frozen=True)
class DeleteRun:
    """Delete a run; its pods get their grace period."""

    run: int
    engine: str
    """The engine that runs it, which may not be the one that the operator would choose today."""


@dataclass(frozen=True)
class AbandonRun:
    """Delete a run whose pods can't be seen to end, since their node doesn't answer: its name is free at once."""

    run: int
    engine: str
    """As of `DeleteRun`."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete the FineTuneJob itself; all of its objects go with it."""


@dataclass(frozen=True)
class HoldJob:
    """Put the finalizer on the job, or take it off."""

    hold: bool


@dataclass(frozen=True)
class MarkCheckpoint:
    """Write the annotations of the last checkpoint on the main object of a run and on its pods."""

    run: int
    engine: str
    """As of `DeleteRun`."""
    annotations: dict[str, str]
    main: bool
    """Whether the main object needs them."""
    pods: tuple[str, ...]
    """Names of the pods that need them."""


Action = StartRun | StopRun | DeleteRun | AbandonRun | DeleteJob | HoldJob | MarkCheckpoint


@dataclass(frozen=True)
class Event:
    """A Kubernetes event about the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """A whole answer: the status as it should read, what to do first, and when to look again."""

    status: dict[str, Any]
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    wake: datetime | None = None
    urgent: bool = False
    """The status differs in more than progress: write it at once."""
