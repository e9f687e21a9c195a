"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from finetune_api.problems import Problem


class State(StrEnum):
    """The result of comparing a fact with a need."""

    OK = "ok"
    WARNING = "warning"
    """Training works, but is slower or has a risk that the remedy removes."""
    MISSING = "missing"
    """Training fails without it."""
    NOT_NEEDED = "not needed"


class Scope(StrEnum):
    """The cause of a finding."""

    IMAGE = "image"
    """The container image or the Python environment, which is the same on every node, with or without GPUs."""
    NODE = "node"
    """The machine and the settings of the container on it."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    state: State
    found: str
    needed: str
    """What is needed; if the state is `NOT_NEEDED`, what would need it."""
    remedy: str = ""
    """The remedy; empty if none is necessary."""
    field: str = "resources.gpusPerNode"
    """The field of the job that causes the need."""
    scope: Scope = Scope.NODE
    device: bool = False
    """Whether a broken GPU explains the finding as well as a wrong setup does."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)

    @property
    def problem(self) -> Problem:
        """The finding as a problem of the job."""
        return Problem(self.field, f"{self.name}: found {self.found}, needed {self.needed}. {self.remedy}")


def missing(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that make training fail."""
    return [one for one in findings if one.state is State.MISSING]
