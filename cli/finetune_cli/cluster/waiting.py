"""`finetune wait`: wait until a job reaches a state."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from finetune_api.exit_codes import ExitCode
from finetune_api.problems import Problem, did_you_mean
from finetune_cli.cluster.jobs import Jobs
from finetune_cli.cluster.reading import condition_of, has_ended, hint_of, is_seen, phase_of
from finetune_trainer.errors import UserError

Json = dict[str, Any]
DELETED = "Deleted"
GOALS = ("Succeeded", "Failed", "Running", "Suspended", "Admitted", "Planned", "Validated", DELETED)
_IMPLIED = {"Running": "Succeeded"}
"""Goals that a later state implies: a job that succeeded has been running, even if this was not observed."""
_NUMBER = r"\d+(?:\.\d+)?"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class WaitCode(IntEnum):
    """Exit codes of `wait` in addition to `ExitCode`."""

    TIMEOUT = 124
    """The same as for `timeout(1)`."""


@dataclass(frozen=True)
class Outcome:
    """Result of a wait."""

    code: int
    message: str


def goal_of(name: str) -> str:
    """Return the goal with this name, ignoring case.

    Raises:
        UserError: the name is not one of `GOALS`.
    """
    known = {goal.lower(): goal for goal in GOALS}
    if name.lower() not in known:
        raise UserError([Problem("--for", f"{name!r} is not a state of a job{did_you_mean(name, GOALS)}")])
    return known[name.lower()]


def seconds_of(text: str) -> float:
    """Parse a duration such as `90`, `90s`, `15m` or `1h30m` to seconds.

    Raises:
        UserError: the text is not a duration.
    """
    if re.fullmatch(_NUMBER, text):
        return float(text)
    if not re.fullmatch(rf"({_NUMBER}[smhd])+", text):
        raise UserError([Problem("--timeout", f"got {text!r}, expected a duration such as 90s, 15m or 2h")])
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(rf"({_NUMBER})([smhd])", text))


def wait(jobs: Jobs, name: str, goal: str, timeout: float | None) -> Outcome:
    """Wait until the job reaches the goal, can no longer reach it, or the timeout expires.

    Args:
        goal: one of `GOALS`.
        timeout: timeout in seconds. None: no timeout.

    Raises:
        UserError: the job does not exist, or is deleted during the wait.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    if goal != DELETED:
        jobs.read(name)
    job: Json | None = None
    for found in jobs.changes(name, deadline):
        job = next(iter(found.values()), None)
        outcome = outcome_of(job, goal)
        if outcome is not None:
            if job is None and goal != DELETED:
                raise UserError(f"job {name!r} was deleted")
            return Outcome(outcome.code, f"{name}: {outcome.message}")
    state = f"{phase_of(job)}. {hint_of(job)}".rstrip(". ") if job is not None else "not found"
    return Outcome(WaitCode.TIMEOUT, f"{name}: not {goal} within {timeout:g} s; it is {state}")


def outcome_of(job: Json | None, goal: str) -> Outcome | None:
    """Return the result of the wait for this state of the job, or None if the wait continues."""
    if job is None:
        return Outcome(ExitCode.OK if goal == DELETED else ExitCode.USER_ERROR, "deleted")
    if goal == DELETED:
        return None
    if has_ended(job) and _holds(job, goal):
        return Outcome(ExitCode.OK, goal)
    if has_ended(job):
        return Outcome(ExitCode.FAILED, f"{phase_of(job)}. {hint_of(job)}".rstrip(". "))
    if is_seen(job) and _holds(job, goal):
        return Outcome(ExitCode.OK, goal)
    return None


def _holds(job: Json, goal: str) -> bool:
    return any(condition_of(job, kind).get("status") == "True" for kind in (goal, _IMPLIED.get(goal, goal)))
