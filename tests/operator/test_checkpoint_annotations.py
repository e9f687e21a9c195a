"""The operator writes the last checkpoint to a run's objects once per checkpoint, where it is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from support.operator.worlds import NOW, VALID, attempt, body, conditions, pod, run, seen

from finetune_operator.core.names import mark_of
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import RunState
from finetune_operator.decide.actions import MarkCheckpoint
from finetune_operator.decide.decide import decide
from finetune_operator.engines.registry import observe_pod
from finetune_operator.plan import Annotate, plan

SETTINGS = Settings()
RUNNING = {"conditions": [*VALID, *conditions(Running="True/Training")], "attempts": [attempt(1)], "attempt": 1}
SAVED = {"stage": 1, "step": 40, "uri": "s3://b/checkpoint-40", "savedAt": "2026-01-01T11:59:00Z"}
MARKS = {
    "finetune.dev/checkpoint-stage": "1",
    "finetune.dev/checkpoint-step": "40",
    "finetune.dev/checkpoint-time": "2026-01-01T11:59:00Z",
}


def marks(*things: Any, report: Any = None, status: Any = RUNNING) -> list[MarkCheckpoint]:
    decision = decide(seen(status, *things, report=report), SETTINGS, NOW)
    return [action for action in decision.actions if isinstance(action, MarkCheckpoint)]


def test_a_new_checkpoint_is_written_on_the_job_and_on_each_pod() -> None:
    (mark,) = marks(run(), pod(), pod(index=1), report={"current": 1, "checkpoint": SAVED})
    assert mark == MarkCheckpoint(1, "job", MARKS, True, ("tiny-1-0-x", "tiny-1-1-x"))
    operations = plan(body(), (mark,), SETTINGS)
    assert operations == [
        Annotate("/apis/batch/v1/namespaces/team/jobs/tiny-1", MARKS),
        Annotate("/api/v1/namespaces/team/pods/tiny-1-0-x", MARKS),
        Annotate("/api/v1/namespaces/team/pods/tiny-1-1-x", MARKS),
    ]
    (of_ray,) = marks(run(engine="kuberay"), report={"current": 1, "checkpoint": SAVED})
    (operation,) = plan(body(), (of_ray,), SETTINGS)
    assert isinstance(operation, Annotate) and operation.path.endswith("/rayjobs/tiny-1")


def test_what_has_it_is_left_alone() -> None:
    text = mark_of(MARKS)
    marked = (replace(run(), checkpoint=text), pod(checkpoint=text))
    assert marks(*marked, report={"current": 1, "checkpoint": SAVED}) == []
    (mark,) = marks(*marked, pod(index=1), report={"current": 1, "checkpoint": SAVED})
    assert (mark.main, mark.pods) == (False, ("tiny-1-1-x",)), "a pod that has joined since"
    (mark,) = marks(*marked, report={"current": 1, "checkpoint": SAVED | {"step": 60}})
    assert mark.main and mark.annotations["finetune.dev/checkpoint-step"] == "60"


def test_a_later_attempt_is_marked_with_the_checkpoint_that_it_goes_on_from() -> None:
    (mark,) = marks(run(), status=RUNNING | {"lastCheckpoint": SAVED})
    assert mark.annotations == MARKS


def test_nothing_is_written_without_a_checkpoint_or_on_what_ends() -> None:
    assert marks(run(), pod(), report={"current": 1}) == []
    assert marks(run(deleting=True), status=RUNNING | {"lastCheckpoint": SAVED}) == []
    assert marks(run(state=RunState.FAILED), pod(exit_code=1), status=RUNNING | {"lastCheckpoint": SAVED}) == []
    (mark,) = marks(run(), pod(), pod(index=1, exit_code=1), status=RUNNING | {"lastCheckpoint": SAVED})
    assert mark.pods == ("tiny-1-0-x",)


def test_a_pod_s_annotations_are_read() -> None:
    labels = {"finetune.dev/job": "tiny", "finetune.dev/run": "1"}
    metadata = {"name": "p", "labels": labels, "annotations": MARKS | {"other": "x"}}
    view = observe_pod({"metadata": metadata, "status": {}})
    assert view is not None and view.checkpoint == "1 40 2026-01-01T11:59:00Z"
