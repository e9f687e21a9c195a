"""The operator reads an object from the API server where the watch cache may be stale."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.operator.worlds import UID, attempt, conditions, pod, run, seen

from finetune_operator.core.snapshot import Observed, RunState
from finetune_operator.observe.cache_staleness import untold_ends, untold_runs

OPEN = {"attempts": [attempt(1)]}
CLOSED = {"attempts": [attempt(1, "TrainingFailed", 10)]}
PLANNED = {"conditions": conditions(Planned="True/PreflightPassed")}
FAILED = run(state=RunState.FAILED)
DONE = pod(phase="Succeeded", exit_code=0)
ENDS: dict[str, tuple[Observed, list[int]]] = {
    "a run that runs": (seen(OPEN, run(), pod()), []),
    "an end without pods": (seen(OPEN, FAILED), [1]),
    "an end before that of its driver": (seen(OPEN, FAILED, pod()), [1]),
    "an end before that of its other pod": (seen(OPEN, FAILED, DONE, pod(index=1)), [1]),
    "an end without its driver": (seen(OPEN, FAILED, pod(index=1, phase="Failed")), [1]),
    "an end after all pods'": (seen(OPEN, FAILED, DONE, pod(index=1, phase="Failed")), []),
    "an end after its pods were deleted": (seen(OPEN, FAILED, replace(pod(), gone=True)), []),
    "an end on record": (seen(CLOSED, FAILED), []),
    "an end that nothing is on record of": (seen(None, FAILED), [1]),
    "another job's end": (seen(OPEN, run(state=RunState.FAILED, owner=f"{UID}-other")), []),
    "a check's end": (seen(None, run(0, RunState.SUCCEEDED)), [0]),
    "a check's end on record": (seen(PLANNED, run(0, RunState.SUCCEEDED)), []),
    "a clean-up's end, which is told by its Job": (seen(None, run(-1, RunState.FAILED)), []),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_that_pods_have_not_told_of(name: str) -> None:
    world, runs = ENDS[name]
    assert [ended.run for ended in untold_ends(world)] == runs


def test_runs_of_attempts_on_record() -> None:
    assert untold_runs(seen({"attempts": [attempt(1, "TrainingFailed", 10), attempt(2)]}, FAILED)) == [2]
    assert untold_runs(seen(OPEN, run())) == []
