"""The whole of what the operator knows of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_operator.core.snapshot import RunView
from finetune_operator.render.run import Run

Json = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """Renders an attempt's main object and reads its state. Both are pure."""

    name: str
    group: str
    version: str
    plural: str
    render: Callable[[Run], Json]
    """The object that runs an attempt, given what `render.support` makes beside it."""
    observe: Callable[[Json], RunView | None]
    """The state of such an object; None for one that isn't the operator's."""
    needs_token_to_go: bool = False
    """Whether its controller reads the run's Secret while the object is being deleted. The object then owns the Secret
    too, so that the Secret goes after it."""
