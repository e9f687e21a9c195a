"""What one watch presupposes and another has not told yet (pure): it is asked for before anything is decided."""

from __future__ import annotations

from finetune_operator import attempts
from finetune_operator.conditions import Type
from finetune_operator.names import CLEANUP_RUN, PREFLIGHT_RUN
from finetune_operator.observed import ENDED, Observed, RunView


def untold_runs(seen: Observed) -> list[int]:
    """Attempts on record that have not ended, and whose run no watch has told of."""
    open_ones = (record["number"] for record in _records(seen) if "endTime" not in record)
    return [number for number in open_ones if seen.run(number) is None]


def untold_ends(seen: Observed) -> list[RunView]:
    """Runs that have ended, of whose end nothing is on record, and whose pods have not all been seen to end: only pods
    say how it ended and what was found."""
    ended = (run for run in seen.runs if run.owner == seen.uid and run.state in ENDED and not _written(seen, run.run))
    return [run for run in ended if not _pods_ended(seen, run.run)]


def _records(seen: Observed) -> list[attempts.Json]:
    return attempts.records(seen.body.get("status") or {})


def _written(seen: Observed, number: int) -> bool:
    if number == PREFLIGHT_RUN:
        conditions = (seen.body.get("status") or {}).get("conditions", [])
        return any(item["type"] == Type.PLANNED and item["status"] != "Unknown" for item in conditions)
    return number == CLEANUP_RUN or any(item["number"] == number and "endTime" in item for item in _records(seen))


def _pods_ended(seen: Observed, number: int) -> bool:
    pods = seen.pods_of(number)
    driver = any(pod.index == 0 for pod in pods)
    return driver and all(pod.gone or pod.phase in ("Succeeded", "Failed") for pod in pods)
