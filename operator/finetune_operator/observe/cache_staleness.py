"""Objects that one watch implies and another has not delivered yet (pure): they are read before a decision."""

from __future__ import annotations

from finetune_operator.core.conditions import Type
from finetune_operator.core.names import CLEANUP_RUN, PREFLIGHT_RUN
from finetune_operator.core.snapshot import ENDED, Observed, RunView
from finetune_operator.decide import attempts


def untold_runs(seen: Observed) -> list[int]:
    """Return the numbers of recorded attempts without an end whose run is not in the cache."""
    status = _status(seen)
    numbers = (record["number"] for record in attempts.records(status))
    return [number for number in numbers if not attempts.closed(status, number) and seen.run(number) is None]


def untold_ends(seen: Observed) -> list[RunView]:
    """Return the ended runs whose end is not in the status and whose pods have not all ended in the cache.

    Only the pods have the reason of a run's end and the result of a preflight.
    """
    ended = (run for run in seen.runs if run.owner == seen.uid and run.state in ENDED and not _written(seen, run.run))
    return [run for run in ended if not _pods_ended(seen, run.run)]


def _status(seen: Observed) -> attempts.Json:
    status: attempts.Json = seen.body.get("status") or {}
    return status


def _written(seen: Observed, number: int) -> bool:
    if number == PREFLIGHT_RUN:
        conditions = _status(seen).get("conditions", [])
        return any(item["type"] == Type.PLANNED and item["status"] != "Unknown" for item in conditions)
    return number == CLEANUP_RUN or attempts.closed(_status(seen), number)


def _pods_ended(seen: Observed, number: int) -> bool:
    pods = seen.pods_of(number)
    driver = any(pod.index == 0 for pod in pods)
    return driver and all(pod.over for pod in pods)
