"""The definition of a check, and the one line that it prints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Options:
    """Options for all checks."""

    tiny: bool
    """Whether to run tiny models on the CPU instead of real ones on the GPU."""
    work: Path
    """Directory of models, data and checkpoints; the caller deletes it."""

    @property
    def accelerator(self) -> bool:
        """Whether the checks compute on a GPU."""
        return not self.tiny

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cpu" if self.tiny else "cuda"


class Skipped(Exception):
    """The machine lacks what the check needs; its code has run as far as possible."""

    def __init__(self, reason: str, values: Json | None = None) -> None:
        super().__init__(reason)
        self.reason, self.values = reason, values or {}


class CheckFailed(Exception):
    """The check found a wrong result."""

    def __init__(self, message: str, values: Json | None = None) -> None:
        super().__init__(message)
        self.values = values or {}


def require(holds: bool, message: str, values: Json) -> None:
    """Check a condition.

    Raises:
        CheckFailed: it does not hold.
    """
    if not holds:
        raise CheckFailed(message, values)


@dataclass(frozen=True)
class Check:
    """A check. `work` returns its values, or raises `Skipped`, `CheckFailed` or any other error."""

    name: str
    part: int
    """The call of the script that runs it, 1 or 2, because a GPU may be available for only a few minutes at a time."""
    seconds: int
    """Estimated time on a GPU: the check is skipped if less of the budget is left, and killed after twice as long."""
    work: Callable[[Options], Json]


@dataclass(frozen=True)
class Result:
    """The outcome of a check. `ok` is None if it was skipped."""

    name: str
    ok: bool | None
    seconds: float
    values: Json = field(default_factory=dict)
    skipped: str | None = None
    error: Json | None = None
    """`class`, `kind` (of finetune_api.device_faults) and `message`."""

    def line(self) -> str:
        """Return one line of JSON, with null for NaN and infinity, which JSON does not have."""
        told = {"name": self.name, "ok": self.ok, "seconds": round(self.seconds, 2), "values": _plain(self.values)}
        told |= {"skipped": self.skipped} if self.skipped else {}
        return json.dumps(told | ({"error": self.error} if self.error else {}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
