"""The result of one check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from finetune_api.problems import Problem


class State(StrEnum):
    """How what was found compares with what is needed."""

    OK = "ok"
    WARNING = "warning"
    """Training works, but slower or with a risk that the remedy removes."""
    MISSING = "missing"
    """Training fails without it."""
    NOT_NEEDED = "not needed"


class Scope(StrEnum):
    """Where the cause of a finding lies."""

    IMAGE = "image"
    """In the container image, or in the Python environment: the same on every node, with or without GPUs."""
    NODE = "node"
    """In the machine and in how the container runs there."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    state: State
    found: str
    needed: str
    """What is needed, or what would need it where the state is `NOT_NEEDED`."""
    remedy: str = ""
    """What to do; empty where nothing has to be done."""
    field: str = "resources.gpusPerNode"
    """The field of the job that brings the need."""
    scope: Scope = Scope.NODE
    device: bool = False
    """Whether a broken GPU explains the finding as well as a wrong setup does."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)

    @property
    def problem(self) -> Problem:
        """The finding as a fault of the job."""
        return Problem(self.field, f"{self.name}: found {self.found}, needed {self.needed}. {self.remedy}")


def missing(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings without which training fails."""
    return [one for one in findings if one.state is State.MISSING]
