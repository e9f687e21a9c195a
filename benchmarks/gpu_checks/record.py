"""What a check is, and the one line that it prints."""

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
    """How the checks run."""

    tiny: bool
    """Tiny models on the CPU in place of real ones on the GPU."""
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
    """What the check is for needs something that is not here. Its code has run as far as it can."""

    def __init__(self, reason: str, values: Json | None = None) -> None:
        super().__init__(reason)
        self.reason, self.values = reason, values or {}


class CheckFailed(Exception):
    """The check found what must not be."""

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
    """One check. `work` returns its values, or raises `Skipped`, `CheckFailed` or what it meets."""

    name: str
    part: int
    """The call of the script that runs it, 1 or 2: a GPU may be lent for some minutes at a time."""
    seconds: int
    """What it needs on a GPU, by estimate: with less of the budget left it is left out, after twice as long killed."""
    work: Callable[[Options], Json]


@dataclass(frozen=True)
class Result:
    """The outcome of a check. `ok` is None where it was skipped."""

    name: str
    ok: bool | None
    seconds: float
    values: Json = field(default_factory=dict)
    skipped: str | None = None
    error: Json | None = None
    """`class`, `kind` (of finetune_api.device_faults) and `message`."""

    def line(self) -> str:
        """One line of JSON. Numbers that are none (NaN, infinity) become null, since JSON has no word for them."""
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
