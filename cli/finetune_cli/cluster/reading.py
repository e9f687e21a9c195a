"""What a FineTuneJob says of itself, whatever operator wrote its status (pure)."""

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
"""Conditions whose message holds a job up, most telling first, and the status in which it doesn't."""


def status_of(job: Json) -> Json:
    found = job.get("status")
    return found if isinstance(found, dict) else {}


def conditions_of(job: Json) -> list[Json]:
    return list(status_of(job).get("conditions") or [])


def condition_of(job: Json, kind: str) -> Json:
    """The condition of that type; empty where there is none."""
    return next((item for item in conditions_of(job) if item.get("type") == kind), {})


def phase_of(job: Json) -> str:
    """The operator's word, or what can be said without it."""
    if "deletionTimestamp" in job["metadata"]:
        return "Deleting"
    return clean(str(status_of(job).get("phase") or "Pending"))


def has_ended(job: Json) -> bool:
    """Whether nothing more happens to it: it succeeded, or failed for good."""
    return any(condition_of(job, kind).get("status") == "True" for kind in ENDED)


def is_moving(job: Json) -> bool:
    """Whether it trains."""
    return phase_of(job) in _MOVING


def is_seen(job: Json) -> bool:
    """Whether the operator has seen the newest spec."""
    observed = status_of(job).get("observedGeneration")
    return observed is None or observed >= job["metadata"].get("generation", 1)


def wants_suspension(job: Json) -> bool:
    return bool(job.get("spec", {}).get("runPolicy", {}).get("suspend"))


def hint_of(job: Json) -> str:
    """What holds the job up or what became of it, in a line; empty where all goes well."""
    if not status_of(job).get("conditions"):
        return "no operator has looked at it yet"
    for kind, quiet in _HINTS.items():
        condition = condition_of(job, kind)
        if condition.get("message") and condition.get("status") != quiet:
            return clean(f"{condition.get('reason', '')}: {condition['message']}")
    return ""


def progress_of(job: Json) -> Progress | None:
    """The newest step; without an ETA where nothing moves."""
    status = status_of(job)
    said = status.get("progress")
    if not isinstance(said, dict) or not isinstance(said.get("step"), int) or not isinstance(said.get("total"), int):
        return None
    stages = status.get("stages") or []
    index = said.get("stageIndex") or 0
    title = stages[index].get("name", "") if 0 <= index < len(stages) else ""
    return Progress(
        stage=index,
        stages=len(stages),
        title=clean(str(title)),
        step=said["step"],
        total=said["total"],
        loss=said.get("loss"),
        learning_rate=said.get("learningRate"),
        tokens_per_second=said.get("tokensPerSecond"),
        samples_per_second=said.get("samplesPerSecond"),
        mfu=said.get("mfu"),
        eta=said.get("etaSeconds") if is_moving(job) else None,
    )


def moment(text: object) -> datetime | None:
    """The time in an RFC 3339 text; None where it is none."""
    try:
        found = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def seconds_between(start: object, end: object | None, now: datetime | None) -> float | None:
    """Seconds from one RFC 3339 time to another, or to now; None where one of them isn't known."""
    first, last = moment(start), moment(end) if end is not None else now
    return (last - first).total_seconds() if first and last else None


def short_duration(seconds: float | None) -> str:
    """As kubectl's tables have it: `45s`, `12m`, `3h20m`, `2d4h`; empty where it isn't known."""
    if seconds is None:
        return ""
    whole = max(int(seconds), 0)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}" + (f"{rest}{part}" if rest and whole < 10 * size else "")
    return f"{whole}s"
