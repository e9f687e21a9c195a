"""`finetune wait`: until a job gets where it is wanted."""

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
"""A job that got to the second has been at the first, seen there or not."""
_NUMBER = r"\d+(?:\.\d+)?"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class WaitCode(IntEnum):
    """Exit codes of `wait` beside those of `ExitCode`."""

    TIMEOUT = 124
    """As of `timeout(1)`."""


@dataclass(frozen=True)
class Outcome:
    """How a wait ended."""

    code: int
    message: str


def goal_of(name: str) -> str:
    """A goal by its name, in whatever case.

    Raises:
        UserError: it is none.
    """
    known = {goal.lower(): goal for goal in GOALS}
    if name.lower() not in known:
        raise UserError([Problem("--for", f"{name!r} is nothing that a job gets to{did_you_mean(name, GOALS)}")])
    return known[name.lower()]


def seconds_of(text: str) -> float:
    """`90`, `90s`, `15m` or `1h30m` in seconds.

    Raises:
        UserError: it is no such time.
    """
    if re.fullmatch(_NUMBER, text):
        return float(text)
    if not re.fullmatch(rf"({_NUMBER}[smhd])+", text):
        raise UserError([Problem("--timeout", f"got {text!r}, expected a time such as 90s, 15m or 2h")])
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(rf"({_NUMBER})([smhd])", text))


def wait(jobs: Jobs, name: str, goal: str, timeout: float | None) -> Outcome:
    """Wait until the job gets to the goal, can no longer get there, or the time is over.

    Args:
        goal: one of `GOALS`.
        timeout: seconds; None: as long as it takes.

    Raises:
        UserError: there is no such job, now or later.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    if goal != DELETED:
        jobs.read(name)
    job: Json | None = None
    for found in jobs.changes(name, deadline):
        job = next(iter(found.values()), None)
        outcome = judged(job, goal)
        if outcome is not None:
            if job is None and goal != DELETED:
                raise UserError(f"job {name!r} was deleted")
            return Outcome(outcome.code, f"{name}: {outcome.message}")
    stands = f"{phase_of(job)}. {hint_of(job)}".rstrip(". ") if job is not None else "not there"
    return Outcome(WaitCode.TIMEOUT, f"{name}: not {goal} within {timeout:g} s; it is {stands}")


def judged(job: Json | None, goal: str) -> Outcome | None:
    """Whether the wait is over with the job as it stands; None: not yet."""
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
