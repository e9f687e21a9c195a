"""Read fields of a FineTuneJob, whose status any version of the operator may have written (pure functions)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_trainer.progress.formatting import clean
from finetune_trainer.progress.reporter import Progress

Json = dict[str, Any]
ENDED = ("Succeeded", "Failed")
_MOVING = ("Running", "Stopping")
_HINTS = {
    "Failed": "False",
    "Suspended": None,
    "Validated": "True",
    "Planned": "True",
    "Admitted": "True",
    "Running": None,
}
"""Conditions to show as a hint, the most important first, and the status in which there is nothing to show."""


def status_of(job: Json) -> Json:
    found = job.get("status")
    return found if isinstance(found, dict) else {}


def conditions_of(job: Json) -> list[Json]:
    return list(status_of(job).get("conditions") or [])


def condition_of(job: Json, kind: str) -> Json:
    """Return the condition of that type, or an empty mapping."""
    return next((item for item in conditions_of(job) if item.get("type") == kind), {})


def phase_of(job: Json) -> str:
    """Return the phase in the status, `Deleting`, or `Pending` if the status has no phase."""
    if "deletionTimestamp" in job["metadata"]:
        return "Deleting"
    return clean(str(status_of(job).get("phase") or "Pending"))


def has_ended(job: Json) -> bool:
    """Return whether the job succeeded or failed permanently."""
    return any(condition_of(job, kind).get("status") == "True" for kind in ENDED)


def is_moving(job: Json) -> bool:
    """Return whether the job is training."""
    return phase_of(job) in _MOVING


def is_seen(job: Json) -> bool:
    """Return whether the operator has observed the current spec."""
    observed = status_of(job).get("observedGeneration")
    return observed is None or observed >= job["metadata"].get("generation", 1)


def wants_suspension(job: Json) -> bool:
    return bool(job.get("spec", {}).get("runPolicy", {}).get("suspend"))


def hint_of(job: Json) -> str:
    """Return a line that explains why the job waits or how it ended, or an empty string."""
    if not status_of(job).get("conditions"):
        return "no operator has processed this job yet"
    for kind, quiet in _HINTS.items():
        condition = condition_of(job, kind)
        if condition.get("message") and condition.get("status") != quiet:
            return clean(f"{condition.get('reason', '')}: {condition['message']}")
    return ""


def progress_of(job: Json) -> Progress | None:
    """Return the progress of the current stage; without an ETA if the job is not training."""
    status = status_of(job)
    found = status.get("progress")
    if not isinstance(found, dict) or not isinstance(found.get("step"), int) or not isinstance(found.get("total"), int):
        return None
    stages = status.get("stages") or []
    index = found.get("stageIndex") or 0
    title = stages[index].get("name", "") if 0 <= index < len(stages) else ""
    return Progress(
        stage=index,
        stages=len(stages),
        title=clean(str(title)),
        step=found["step"],
        total=found["total"],
        loss=found.get("loss"),
        learning_rate=found.get("learningRate"),
        tokens_per_second=found.get("tokensPerSecond"),
        samples_per_second=found.get("samplesPerSecond"),
        mfu=found.get("mfu"),
        eta=found.get("etaSeconds") if is_moving(job) else None,
    )


def parse_time(text: object) -> datetime | None:
    """Parse an RFC 3339 time; return None if the text is not one."""
    try:
        found = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def seconds_between(start: object, end: object | None, now: datetime | None) -> float | None:
    """Return the seconds from one RFC 3339 time to another, or to now; None if one of them is unknown."""
    first, last = parse_time(start), parse_time(end) if end is not None else now
    return (last - first).total_seconds() if first and last else None


def short_duration(seconds: float | None) -> str:
    """Return a duration in kubectl's format: `45s`, `12m`, `3h20m`, `2d4h`; empty if unknown."""
    if seconds is None:
        return ""
    whole = max(int(seconds), 0)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}" + (f"{rest}{part}" if rest and whole < 10 * size else "")
    return f"{whole}s"
