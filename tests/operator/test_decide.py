"""A table of observed jobs and of the decisions that follow from them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from support.operator.worlds import NOW, UID, VALID, ago, attempt, conditions, pod, run, said, seen

from finetune_operator.core.conditions import Reason
from finetune_operator.core.names import FINALIZER, support_name
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Complaint, Observed, RunState, RunView, Trouble
from finetune_operator.decide.actions import AbandonRun, Decision, DeleteJob, DeleteRun, HoldJob, StartRun, StopRun
from finetune_operator.decide.decide import decide
from finetune_operator.decide.printer_columns import plan_summary

SETTINGS = Settings(backoff_seconds=10, backoff_cap_seconds=300)
TOKEN = support_name("tiny", 1, UID, SETTINGS.token_key)
RUNNING = {"conditions": [*VALID, *conditions(Running="True/Training")], "attempts": [attempt(1)], "attempt": 1}
STARTING = {"conditions": [*VALID, *conditions(Running="False/Starting")], "attempts": [attempt(1)], "attempt": 1}
QUEUED = {"conditions": [*VALID, *conditions(Running="False/Queued")], "attempts": [attempt(1)], "attempt": 1}
OVER = {"conditions": [*VALID, *conditions(Succeeded="True/Completed")], "completionTime": ago(100)}


def failed(*records: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"conditions": VALID, "attempts": list(records), **more}


def kuberay(state: RunState = RunState.RUNNING, **fields: Any) -> RunView:
    """Return an attempt as the engine `kuberay` observes it."""
    return run(state=state, engine="kuberay", ends_with_driver=True, **fields)


def own_error(number: int, ended: float, **fields: Any) -> dict[str, Any]:
    """Return an attempt that failed with an error of the trainer, whose message contains a number that differs."""
    error = {"message": f"RuntimeError: {number} elements", "exitCode": 1, "stage": 0, "step": 7}
    return attempt(number, "TrainingFailed", ended, **error | fields)


CASES: dict[str, tuple[Observed, str, tuple[Any, ...]]] = {
    "a new job starts": (seen(), "Pending", (StartRun(1),)),
    "a new job is checked first": (seen(None, kubernetes={}), "Preflight", (StartRun(0),)),
    "a suspended job does not start": (seen(None, runPolicy={"suspend": True}), "Suspended", ()),
    "an attempt found running is adopted": (seen(None, run()), "Running", ()),
    "an attempt found running ends the suspension": (
        seen({"conditions": [*VALID, *conditions(Suspended="True/Suspended")]}, run()), "Running", ()),
    "another owner's run is nobody's": (seen(None, run(owner="other")), "Pending", (StartRun(1),)),
    "pods on their way": (seen(STARTING, run(state=RunState.PENDING)), "Pending", ()),
    "pods on their way once more, after a queue": (seen(QUEUED, run(state=RunState.PENDING)), "Pending", ()),
    "pods on their way that nothing is written of yet": (
        seen({"conditions": [*VALID, *conditions(Running="False/Stopping")],
              "attempts": [attempt(1, "TrainingFailed", 11)], "attempt": 1},
             run(state=RunState.FAILED), run(2, RunState.PENDING)), "Pending", ()),
    "pods that end": (seen(RUNNING, run(state=RunState.PENDING)), "Stopping", ()),
    "a pod that ends": (
        seen(RUNNING, run(state=RunState.PENDING), pod(), pod(index=1, exit_code=1, phase="Failed")), "Stopping", ()),
    "a pod whose node does not answer": (
        seen(RUNNING, run(state=RunState.PENDING), pod(), pod(index=1, ready=False)), "Running", ()),
    "a pod that has never been ready": (
        seen(STARTING, run(state=RunState.PENDING), pod(), pod(index=1, ready=False)), "Pending", ()),
    "suspension asks for a checkpoint where a node does not answer": (
        seen(RUNNING, run(state=RunState.PENDING), pod(), pod(index=1, ready=False), runPolicy={"suspend": True}),
        "Stopping", (StopRun(1),)),
    "resumed, and not checked before": (
        seen({"conditions": [*VALID[:1], *conditions(Suspended="True/Suspended")]}, kubernetes={}), "Preflight",
        (StartRun(0),)),
    "a queue holds it": (seen(RUNNING, run(state=RunState.QUEUED)), "Queued", ()),
    "a driver that ended well, and a worker that left first": (
        seen(RUNNING, run(state=RunState.FAILED), pod(phase="Succeeded", exit_code=0),
             pod(index=1, phase="Failed", exit_code=1)), "Succeeded", ()),
    "a lost head, which KubeRay would replace": (
        seen(RUNNING, kuberay(), pod(gone=True), pod(index=1)), "Retrying", (DeleteRun(1, "kuberay"),)),
    "a lost head that KubeRay has replaced": (
        seen(RUNNING, kuberay(), pod(name="new", created=ago(1)), pod(name="old", created=ago(60), phase="Failed",
             exit_code=2, termination_message=said(2, "bad"))), "Failed", (DeleteRun(1, "kuberay"),)),
    "a lost head of a RayJob that a queue has suspended": (
        seen(RUNNING, kuberay(state=RunState.QUEUED), pod(gone=True)), "Queued", ()),
    "a head that never ran is replaced": (
        seen(STARTING, kuberay(state=RunState.PENDING), pod(phase="Pending", gone=True)), "Pending", ()),
    "a worker's pod that is lost comes again": (
        seen(RUNNING, kuberay(), pod(), pod(index=1, phase="Failed", exit_code=1)), "Running", ()),
    "a worker's node that does not suit the job": (
        seen(RUNNING, kuberay(), pod(), pod(index=1, exit_code=2, termination_message=said(2, "no GPU"))), "Failed",
        (DeleteRun(1, "kuberay"),)),
    "a Job's success waits for the driver's last word": (
        seen(RUNNING, run(state=RunState.SUCCEEDED, ended=NOW - timedelta(seconds=5)), pod()), "Running", ()),
    "but not for long": (
        seen(RUNNING, run(state=RunState.SUCCEEDED, ended=NOW - timedelta(seconds=21)), pod()), "Succeeded", ()),
    "a RayJob's end waits for the head's last word": (
        seen(RUNNING, kuberay(state=RunState.FAILED, ended=NOW - timedelta(seconds=5)), pod()), "Running", ()),
    "but not for ever": (
        seen(RUNNING, kuberay(state=RunState.FAILED, ended=NOW - timedelta(seconds=21)), pod()), "Pending",
        (StartRun(2),)),
    "a RayJob that KubeRay does not start": (
        seen(STARTING, kuberay(state=RunState.PENDING, age=601, message="KubeRay: Initializing"), pod()), "Stopping",
        (DeleteRun(1, "kuberay"),)),
    "a RayJob that KubeRay has a while to start": (
        seen(STARTING, kuberay(state=RunState.PENDING, age=599, message="KubeRay: Initializing"), pod()), "Pending",
        ()),
    "a RayJob whose pods took long to be ready": (
        seen(STARTING, kuberay(state=RunState.PENDING, age=5000, message="KubeRay: Initializing"),
             pod(created=ago(5000), ready_since=ago(10))), "Pending", ()),
    "the time in a queue does not count": (
        seen({"conditions": VALID + conditions(Admitted="True/NotQueued")} | {"attempts": [attempt(1)], "attempt": 1},
             kuberay(state=RunState.PENDING, age=5000, message="KubeRay: Initializing")), "Pending", ()),
    "a user error ends it": (
        seen(RUNNING, run(state=RunState.FAILED), pod(exit_code=2, termination_message=said(2, "bad"))), "Failed", ()),
    "a gate that is not passed ends it": (
        seen(RUNNING, run(state=RunState.FAILED), pod(exit_code=4, termination_message=said(4, "low"))), "Failed", ()),
    "success": (seen(RUNNING, run(state=RunState.SUCCEEDED)), "Succeeded", ()),
    "success outweighs a suspension": (
        seen(RUNNING, run(state=RunState.SUCCEEDED), runPolicy={"suspend": True}), "Succeeded", ()),
    "a crash waits first": (seen(RUNNING, run(state=RunState.FAILED), pod(exit_code=1)), "Retrying", ()),
    "a wait that is over": (seen(failed(attempt(1, "TrainingFailed", 11))), "Pending", (StartRun(2),)),
    "the wait doubles": (
        seen(failed(attempt(1, "TrainingFailed", 90), attempt(2, "TrainingFailed", 11))), "Retrying", ()),
    "a resumed job does not wait": (
        seen(failed(attempt(1, "Interrupted", 1, requested=True))), "Pending", (StartRun(2),)),
    "too many failures": (
        seen(failed(*(attempt(n, "TrainingFailed", 1000) for n in (1, 2))), runPolicy={"backoffLimit": 1}),
        "Failed", ()),
    "the same error at the same step ends it": (
        seen(failed(own_error(1, 1000), own_error(2, 900))), "Failed", ()),
    "the same error at another step does not": (
        seen(failed(own_error(1, 1000), own_error(2, 900, step=8))), "Pending", (StartRun(3),)),
    "another error at the same step does not": (
        seen(failed(own_error(1, 1000), own_error(2, 900, message="RuntimeError: another"))), "Pending",
        (StartRun(3),)),
    "the same error with an eviction between does not": (
        seen(failed(own_error(1, 1000), attempt(2, "Evicted", 950), own_error(3, 900))), "Pending", (StartRun(4),)),
    "the same outage at the same step does not": (
        seen(failed(*(own_error(n, 1000, message="ConnectionError: writing run.json: timed out") for n in (1, 2)))),
        "Pending", (StartRun(3),)),
    "a driver that is killed twice at the same step is tried again": (
        seen(failed(*(own_error(n, 1000, exitCode=137) for n in (1, 2)))), "Pending", (StartRun(3),)),
    "evictions don't count": (
        seen(failed(*(attempt(n, "Evicted", 1000) for n in range(1, 9))), runPolicy={"backoffLimit": 1}),
        "Pending", (StartRun(9),)),
    "progress sets the count back": (
        seen(failed(*(attempt(n, "TrainingFailed", 1000, checkpoint=f"c-{n}") for n in range(1, 9))),
             runPolicy={"backoffLimit": 0}), "Failed", ()),
    "suspension asks for a checkpoint": (seen(RUNNING, run(), runPolicy={"suspend": True}), "Stopping", (StopRun(1),)),
    "and asks again": (
        seen(RUNNING | {"attempts": [attempt(1, stopRequestedTime=ago(5))]}, run(), runPolicy={"suspend": True}),
        "Stopping", (StopRun(1),)),
    "and then stops the pods": (
        seen(RUNNING | {"attempts": [attempt(1, stopRequestedTime=ago(121))]}, run(), runPolicy={"suspend": True}),
        "Stopping", (DeleteRun(1, "job"),)),
    "what has not begun is deleted at once": (
        seen(RUNNING, run(state=RunState.PENDING), runPolicy={"suspend": True}), "Stopping", (DeleteRun(1, "job"),)),
    "what was asked to stop and ends is not deleted meanwhile": (
        seen(RUNNING | {"attempts": [attempt(1, stopRequestedTime=ago(5))]}, run(state=RunState.PENDING),
             runPolicy={"suspend": True}), "Stopping", (StopRun(1),)),
    "pods that are going are waited for": (
        seen(RUNNING, run(deleting=True), runPolicy={"suspend": True}), "Stopping", ()),
    "suspended once they are gone": (
        seen(RUNNING | {"attempts": [attempt(1, stopReason="Suspended")]}, runPolicy={"suspend": True}),
        "Suspended", ()),
    "a deadline asks for a checkpoint": (
        seen(RUNNING | {"startTime": ago(61)}, run(), runPolicy={"activeDeadlineSeconds": 60}),
        "Stopping", (StopRun(1),)),
    "a deadline between two attempts": (
        seen(failed(attempt(1, "TrainingFailed", 5), startTime=ago(61)), runPolicy={"activeDeadlineSeconds": 60}),
        "Failed", ()),
    "before the deadline": (
        seen(RUNNING | {"startTime": ago(59)}, run(), runPolicy={"activeDeadlineSeconds": 60}), "Running", ()),
    "a finished job stays": (seen(OVER), "Succeeded", ()),
    "a finished job goes after its time": (
        seen(OVER, runPolicy={"ttlSecondsAfterFinished": 99}), "Succeeded", (DeleteJob(),)),
    "not before": (seen(OVER, runPolicy={"ttlSecondsAfterFinished": 101}), "Succeeded", ()),
    "what still runs of a finished job is stopped": (seen(OVER, run(2)), "Succeeded", (DeleteRun(2, "job"),)),
    "a Job deleted behind our back": (seen(RUNNING), "Retrying", ()),
    "a suspended job is not checked either": (
        seen({"conditions": VALID[:1]}, run(0, RunState.PENDING), kubernetes={}, runPolicy={"suspend": True}),
        "Suspended", (DeleteRun(0, "job"),)),
    "suspended while it waits to try again": (
        seen(failed(attempt(1, "TrainingFailed", 1)), runPolicy={"suspend": True}), "Suspended", ()),
    "a suspended job has no deadline": (
        seen({"conditions": [*VALID, *conditions(Suspended="True/Suspended")]},
             runPolicy={"suspend": True, "activeDeadlineSeconds": 1}), "Suspended", ()),
    "a preflight whose image may yet come": (
        seen({"conditions": VALID[:1]}, run(0, RunState.PENDING, age=1199), pod(0, waiting=("ErrImagePull", "x")),
             kubernetes={}), "Preflight", ()),
    "a preflight whose image never comes": (
        seen({"conditions": VALID[:1]}, run(0, RunState.PENDING, age=1201), pod(0, waiting=("ErrImagePull", "x")),
             kubernetes={}), "Failed", (DeleteRun(0, "job"),)),
    "a preflight that a queue holds": (
        seen({"conditions": VALID[:1]}, run(0, RunState.QUEUED), kubernetes={}), "Preflight", ()),
    "what another engine began is deleted there": (
        seen(RUNNING, run(engine="kuberay", state=RunState.PENDING), runPolicy={"suspend": True}),
        "Stopping", (DeleteRun(1, "kuberay"),)),
    "a node that is gone takes its attempt along": (
        seen(RUNNING, run(), pod(), pod(index=1, grace_over=31)), "Retrying", (AbandonRun(1, "job"),)),
    "a node that Kubernetes has given up": (
        seen(RUNNING, run(state=RunState.PENDING), pod(),
             pod(index=1, grace_over=-100, ready=False, disruption="DeletionByTaintManager")),
        "Retrying", (AbandonRun(1, "job"),)),
    "a node that is tainted and answers": (
        seen(RUNNING, run(), pod(), pod(index=1, grace_over=-100, disruption="DeletionByTaintManager")), "Running", ()),
    "a pod has time to end": (seen(RUNNING, run(), pod(), pod(index=1, grace_over=29)), "Running", ()),
    "a pod that has ended is not lost": (
        seen(RUNNING, run(), pod(), pod(index=1, grace_over=100, phase="Failed")), "Running", ()),
    "a suspension does not wait for a lost node": (
        seen(RUNNING, run(deleting=True), pod(grace_over=31), runPolicy={"suspend": True}),
        "Suspended", (AbandonRun(1, "job"),)),
    "the next attempt does not wait for what is left of a lost one": (
        seen(failed(attempt(1, "NodeLost", 11)), run(deleting=True), pod(grace_over=50)),
        "Pending", (AbandonRun(1, "job"), StartRun(2))),
    "a preflight on a lost node is given up": (
        seen({"conditions": VALID[:1]}, run(0), pod(0, grace_over=31), kubernetes={}),
        "Preflight", (AbandonRun(0, "job"),)),
    "memory that runs out before any checkpoint ends it": (
        seen(RUNNING, run(state=RunState.FAILED), pod(terminated="OOMKilled", exit_code=137)), "Failed", ()),
    "memory that runs out after one is tried again": (
        seen(RUNNING | {"lastCheckpoint": {"uri": "c-1", "stage": 1, "step": 10}}, run(state=RunState.FAILED),
             pod(terminated="OOMKilled", exit_code=137)), "Retrying", ()),
    "but not twice at the same place": (
        seen({"conditions": VALID, "attempts": [attempt(1, "OOMKilled", 60, checkpoint="c-1"), attempt(2)],
              "attempt": 2, "lastCheckpoint": {"uri": "c-1", "stage": 1, "step": 10}},
             run(2, RunState.FAILED), pod(2, terminated="OOMKilled", exit_code=137)), "Failed", ()),
    "preflight passed": (
        seen({"conditions": VALID[:1]}, run(0, RunState.SUCCEEDED),
             pod(0, termination_message=said(plan={"parameters": 7})), kubernetes={}), "Pending", (StartRun(1),)),
    "preflight passed, and its Job does not say so yet": (
        seen({"conditions": VALID[:1]}, run(0), pod(0, phase="Succeeded", exit_code=0), kubernetes={}), "Pending",
        (StartRun(1),)),
    "preflight failed": (
        seen({"conditions": VALID[:1]}, run(0, RunState.FAILED), pod(0, exit_code=2, termination_message=said(2, "no")),
             kubernetes={}), "Failed", ()),
    "preflight passed, and its Job was cleaned up": (
        seen({"conditions": VALID[:1], "attempts": [attempt(1)]}, run(), kubernetes={}), "Running", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decision(name: str) -> None:
    world, phase, actions = CASES[name]
    decision = decide(world, SETTINGS, NOW)
    assert (decision.status["phase"], decision.actions) == (phase, actions)


@pytest.mark.parametrize("name", CASES)
def test_deciding_again_from_the_result_settles(name: str) -> None:
    """A second decision after only the status was written requests no action."""
    world, _, actions = CASES[name]
    first = decide(world, SETTINGS, NOW)
    again = Observed({**world.body, "status": first.status}, world.runs, world.pods)
    started = tuple(action.run for action in actions if isinstance(action, StartRun))
    again = Observed(again.body, (*world.runs, *(run(n, RunState.PENDING) for n in started)), world.pods)
    second = decide(again, SETTINGS, NOW)
    third = decide(Observed({**world.body, "status": second.status}, again.runs, again.pods), SETTINGS, NOW)
    assert third.status == second.status
    assert not any(isinstance(action, StartRun) for action in second.actions)
    assert third.events == ()


def test_the_secret_that_an_operator_did_not_get_to_make() -> None:
    """The operator ended between the RayJob and its Secret: the kubelet reports the missing Secret until it exists."""
    message = f'secret "{TOKEN}" not found'
    waits = pod(phase="Pending", waiting=("CreateContainerConfigError", message))
    assert decide(seen(STARTING, kuberay(RunState.PENDING), waits), SETTINGS, NOW).actions == (StartRun(1),)
    events = (Complaint("FailedMount", f'MountVolume.SetUp failed for volume "finetune-token" : {message}'),)
    world = replace(seen(STARTING, kuberay(RunState.PENDING), pod(phase="Pending")), complaints=events)
    assert decide(world, SETTINGS, NOW).actions == (StartRun(1),)


def test_of_the_pods_of_a_preflight_the_newest_counts() -> None:
    first = pod(0, name="tiny-preflight-a", created=ago(60), exit_code=1, termination_message=said(1, "no network"))
    last = pod(0, name="tiny-preflight-b", created=ago(30), exit_code=2, termination_message=said(2, "no such file"))
    world = seen({"conditions": VALID[:1]}, run(0, RunState.FAILED), first, last, kubernetes={})
    assert decide(world, SETTINGS, NOW).status["failure"] == {
        "reason": "UserError", "message": "no such file", "pod": "tiny-preflight-b", "node": "node-a", "exitCode": 2,
        "attempt": 0}  # fmt: skip


def test_a_repeated_error_is_told_with_its_reason() -> None:
    """The step comes from the report, and the message is the last line of the driver."""
    text = "Traceback (most recent call last):\n  step()\nRuntimeError: shape [{}] is invalid"
    report = {"current": 1, "step": {"step": 3, "total": 10}, "stages": []}
    status: dict[str, Any] = {"conditions": VALID}
    for number in (1, 2):
        status["attempts"] = [*status.get("attempts", []), attempt(number)]
        ended = pod(number, exit_code=1, phase="Failed", termination_message=said(1, text.format(number), **report))
        status = decide(seen(status, run(number, RunState.FAILED), ended), SETTINGS, NOW).status
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "RepeatedError")
    assert failed["message"].endswith("at the same step: RuntimeError: shape [2] is invalid")
    assert status["attempts"][1]["step"] == 3 and status["phase"] == "Failed"


def test_the_wait_before_the_next_attempt() -> None:
    decision = decide(seen(failed(attempt(1, "TrainingFailed", 4))), SETTINGS, NOW)
    assert decision.wake == NOW + timedelta(seconds=6)
    assert "next attempt at" in next(c for c in decision.status["conditions"] if c["type"] == "Running")["message"]


def test_what_is_refused_now_is_tried_later() -> None:
    trouble = Trouble(Reason.FORBIDDEN, "exceeded quota", NOW + timedelta(seconds=3))
    world = seen()
    now = decide(Observed(world.body, trouble=trouble), SETTINGS, NOW)
    assert now.actions == () and now.wake == trouble.again
    assert decide(Observed(world.body, trouble=trouble), SETTINGS, trouble.again).actions == (StartRun(1),)


def test_progress_alone_is_not_urgent() -> None:
    first = decide(seen(RUNNING, run()), SETTINGS, NOW).status
    report = {"current": 1, "step": {"step": 3, "total": 10, "loss": 2.5}, "stages": []}
    later = decide(seen(first, run(), report=report), SETTINGS, NOW)
    assert later.status["step"] == "3/10" and not later.urgent
    assert decide(seen(first, run(state=RunState.PENDING)), SETTINGS, NOW).urgent


def test_an_attempt_that_waits_for_storage_says_so() -> None:
    report = {"stages": [], "waiting": "team/job: writing run.json: OSError: [Errno 121] internal error"}
    running = _running(decide(seen(RUNNING, run(), report=report), SETTINGS, NOW))
    assert running["status"] == "True" and running["message"] == f"waiting for storage: {report['waiting']}"
    assert _running(decide(seen(RUNNING, run(), report={"stages": []}), SETTINGS, NOW))["message"] == ""


def test_an_attempt_whose_workers_start_again_says_why() -> None:
    report = {"stages": [], "restarting": "error: OSError: [Errno 28] No space left on device"}
    running = _running(decide(seen(RUNNING, run(), report=report), SETTINGS, NOW))
    assert running["status"] == "True"
    assert running["message"] == f"restarting from the last checkpoint: {report['restarting']}"


def test_a_plan_says_how_long_a_checkpoint_takes_and_what_to_change() -> None:
    plan = {"parameters": 70, "checkpointBytes": 788 << 30, "saveSeconds": 530, "warnings": ["set a to 900"]}
    assert plan_summary(plan) == "70 parameters, 788.0 GiB per checkpoint, 8m to save. Warning: set a to 900"


def test_a_slow_transport_between_nodes_is_in_the_condition_and_the_status() -> None:
    transport = {"network": "Socket", "gpuDirect": False, "words": "NET/Socket (TCP) between nodes", "warning": "slow"}
    decision = decide(seen(RUNNING, run(), report={"stages": [], "transport": transport}), SETTINGS, NOW)
    assert decision.status["transport"] == transport
    running = _running(decision)
    assert running["status"] == "True" and running["message"] == "slow"


def _running(decision: Decision) -> dict[str, Any]:
    return next(item for item in decision.status["conditions"] if item["type"] == "Running")


def test_times_of_conditions_move_with_their_status_alone() -> None:
    decision = decide(seen(RUNNING, run()), SETTINGS, NOW)
    times = {item["type"]: item["lastTransitionTime"] for item in decision.status["conditions"]}
    assert times["Validated"] == ago(500) and times["Running"] == ago(500) and times["Admitted"] == ago(0)


def test_a_status_of_many_attempts_stays_small() -> None:
    records = [attempt(n, "Interrupted", 1000, requested=True) for n in range(1, 60)]
    decision = decide(seen(failed(*records)), SETTINGS, NOW)
    assert decision.actions == (StartRun(60),) and len(decision.status["attempts"]) == 20


def test_what_an_ended_attempt_said_does_not_outweigh_the_newest() -> None:
    """The pod of the ended attempt still exists, with its termination message, while the next attempt is further."""
    old = {"checkpoint": {"stage": 1, "step": 2, "uri": "c-2"}}
    new = {"current": 1, "checkpoint": {"stage": 1, "step": 3, "uri": "c-3"}}
    status = RUNNING | {"attempts": [attempt(1, "Interrupted", 50), attempt(2)], "attempt": 2}
    ended = pod(1, exit_code=75, phase="Failed", termination_message=said(75, "stopped", **old))
    decision = decide(seen(status, run(1, RunState.FAILED), ended, run(2), report=new), SETTINGS, NOW)
    assert decision.status["lastCheckpoint"]["step"] == 3


TOLD: dict[str, tuple[Observed, list[str]]] = {
    "a start": (seen(), ["Starting"]),
    "the check before it": (seen({"conditions": VALID[:1]}, run(0, RunState.SUCCEEDED), kubernetes={}),
                            ["PreflightPassed", "Starting"]),
    "held by a queue": (seen(RUNNING, run(state=RunState.QUEUED)), ["Queued"]),
    "let go by it": (
        seen({"conditions": [*VALID, *conditions(Admitted="False/Queued", Running="False/Queued")]},
             run(state=RunState.PENDING)), ["NotQueued", "Starting"]),
    "training": (seen({"conditions": VALID}, run()), ["Training"]),
    "a start that could not be written": (
        seen(RUNNING, run(state=RunState.FAILED), pod(exit_code=1), run(2, RunState.PENDING), pod(2)),
        ["TrainingFailed", "Starting"]),
    "asked to stop": (seen(RUNNING, run(), runPolicy={"suspend": True}), ["Stopping"]),
    "stopped": (seen(RUNNING | {"attempts": [attempt(1, stopReason="Suspended")]}, runPolicy={"suspend": True}),
                ["Suspended"]),
    "resumed": (seen({"conditions": [*VALID, *conditions(Suspended="True/Suspended")]}), ["Resumed", "Starting"]),
    "crashed": (seen(RUNNING, run(state=RunState.FAILED), pod(exit_code=1)), ["TrainingFailed", "BackOff"]),
    "deleted by somebody": (seen(RUNNING), ["RunDeleted", "BackOff"]),
    "done": (seen(RUNNING, run(state=RunState.SUCCEEDED)), ["Completed"]),
    "refused": (seen(storage={"path": "runs"}), ["InvalidSpec"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_events_tell_each_change(name: str) -> None:
    world, reasons = TOLD[name]
    events = decide(world, SETTINGS, NOW).events
    assert [event.reason for event in events] == reasons
    assert all(event.message for event in events)


def test_an_event_for_each_stage_that_is_done() -> None:
    stages = [{"name": "tokenizer", "state": "Succeeded", "result": "/pvc/t"}, {"name": "pretrain", "state": "Running"}]
    report = {"current": 1, "stages": stages}
    first = decide(seen(RUNNING, run(), report=report), SETTINGS, NOW)
    told = [(event.reason, event.message) for event in first.events if event.reason == "StageSucceeded"]
    assert told == [("StageSucceeded", "stage 1/2 tokenizer: /pvc/t")] and first.urgent
    assert decide(seen(first.status, run(), report=report), SETTINGS, NOW).events == ()


def test_the_traceback_stands_beside_the_message() -> None:
    text = "Traceback (most recent call last):\n  step()\nRuntimeError: what nobody expects"
    ended = pod(exit_code=1, phase="Failed", termination_message=said(1, text))
    failure = decide(seen(RUNNING, run(state=RunState.FAILED), ended), SETTINGS, NOW).status["failure"]
    assert failure == {"reason": "TrainingFailed", "message": "RuntimeError: what nobody expects", "traceback": text,
                       "pod": "tiny-1-0-x", "node": "node-a", "exitCode": 1, "attempt": 1}  # fmt: skip


def test_what_ends_a_job_is_its_failure_and_no_older_one() -> None:
    older = failed(attempt(1, "Evicted", 100), failure={"reason": "Evicted", "message": "x", "attempt": 1})
    trouble = Trouble(Reason.REJECTED, "Job tiny-2: invalid", NOW)
    decision = decide(Observed(seen(older).body, trouble=trouble), SETTINGS, NOW)
    assert decision.status["failure"] == {"reason": "Rejected", "message": "Job tiny-2: invalid"}


def test_what_kubernetes_complains_of_is_told_while_nothing_begins() -> None:
    complaint = Complaint("FailedCreate", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"', True)
    world = seen(RUNNING, run(state=RunState.PENDING))
    status = decide(replace(world, complaints=(complaint,)), SETTINGS, NOW).status
    running = next(item for item in status["conditions"] if item["type"] == "Running")
    assert (running["reason"], "PodSecurity" in running["message"]) == ("Forbidden", True)


def test_workers_that_ray_has_no_room_for_are_told() -> None:
    world = seen(RUNNING, run(), pod(), report={"stages": [], "placing": "no room for 2 workers of 1 CPU each"})
    told = next(item for item in decide(world, SETTINGS, NOW).status["conditions"] if item["type"] == "Running")
    assert (told["status"], told["message"]) == ("True", "no room for 2 workers of 1 CPU each")


ELSEWHERE = "kueue.x-k8s.io/multikueue"
PREEMPTED = Complaint("Queued", "Preempted: to accommodate a workload")


def told(world: Observed, kind: str, settings: Settings = SETTINGS) -> dict[str, Any]:
    """Return one condition of the status that a decision writes."""
    conditions: list[dict[str, Any]] = decide(world, settings, NOW).status["conditions"]
    return next(item for item in conditions if item["type"] == kind)


def test_a_queue_s_own_words_and_no_deadline_while_it_holds_the_attempt() -> None:
    """The deadline restarts with the admission, as after a suspension."""
    policy = {"activeDeadlineSeconds": 60}
    world = seen(RUNNING | {"startTime": ago(59)}, run(state=RunState.QUEUED), pod(), runPolicy=policy)
    world = replace(world, complaints=(PREEMPTED,))
    decision = decide(world, SETTINGS, NOW)
    assert "startTime" not in decision.status and decision.status["phase"] == "Queued"
    assert told(world, "Admitted")["message"] == "Preempted: to accommodate a workload"
    assert told(world, "Running")["message"] == "the pods save a checkpoint and stop"
    later = replace(world, body={**world.body, "status": decision.status})
    assert decide(later, SETTINGS, NOW + timedelta(seconds=3600)).status["phase"] == "Queued"


def test_a_queue_s_time_is_not_the_image_s() -> None:
    """The timeout of image pulls starts when the pods are created, not while a queue holds the run."""
    since = ago(10)
    pulls = pod(phase="Pending", created=since, waiting=("ImagePullBackOff", "no such image"))
    world = seen(QUEUED, run(state=RunState.PENDING, age=5000), pulls)
    assert decide(world, SETTINGS, NOW).actions == ()
    assert decide(world, SETTINGS, NOW + timedelta(seconds=300)).actions == (DeleteRun(1, "job"),)


def test_a_queue_may_not_hold_a_preflight_for_ever() -> None:
    limited = Settings(helper_queue_seconds=100)
    waits = seen({"conditions": VALID[:1]}, run(0, RunState.QUEUED, age=99), kubernetes={})
    waits = replace(waits, complaints=(Complaint("Queued", "Pending: no quota"),))
    assert told(waits, "Planned", limited)["message"] == "Pending: no quota"
    late = replace(waits, runs=(run(0, RunState.QUEUED, age=101),))
    decision = decide(late, limited, NOW)
    assert decision.actions == (DeleteRun(0, "job"),) and decision.status["phase"] == "Failed"
    assert "held preflight for 100 s: Pending: no quota" in told(late, "Failed", limited)["message"]


def deleted(*things: Any) -> Observed:
    """Return a job that is being deleted and whose storage must be removed."""
    world = seen({"conditions": VALID}, *things, storage={"uri": "s3://b/runs", "deletionPolicy": "Delete"})
    marks = {"deletionTimestamp": ago(10), "finalizers": [FINALIZER]}
    return replace(world, body={**world.body, "metadata": {**world.body["metadata"], **marks}})


def test_a_deleted_job_says_what_it_waits_for_and_a_queue_may_not_hold_it_for_ever() -> None:
    assert "waiting for the pods of tiny-1 to end" in told(deleted(run(), pod()), "Running")["message"]
    limited = Settings(helper_queue_seconds=100)
    waits = replace(deleted(run(-1, RunState.QUEUED, age=99)), complaints=(PREEMPTED,))
    assert "a queue holds the clean-up: Preempted" in told(waits, "Running", limited)["message"]
    assert decide(waits, limited, NOW).actions == ()
    late = decide(replace(waits, runs=(run(-1, RunState.QUEUED, age=101),)), limited, NOW)
    assert late.actions == (DeleteRun(-1, "job"), HoldJob(False))
    assert "the queue held the clean-up for too long" in late.events[-1].message


@pytest.mark.parametrize(("status", "number"), [(STARTING, 1), ({"conditions": VALID[:1]}, 0)])
def test_a_job_that_its_queue_sends_to_another_cluster_is_refused(status: dict[str, Any], number: int) -> None:
    """MultiKueue runs the pods elsewhere, also those of the preflight, and holds the Job here meanwhile."""
    away = run(number, RunState.QUEUED, elsewhere=ELSEWHERE)
    world = seen(status, away, kubernetes={"preflight": not number})
    decision = decide(world, SETTINGS, NOW)
    assert decision.actions == (DeleteRun(number, "job"),)
    failed = told(world, "Failed")
    assert failed["reason"] == "Rejected" and ELSEWHERE in failed["message"]


def test_a_clean_up_that_is_sent_to_another_cluster_holds_no_job() -> None:
    decision = decide(deleted(run(-1, RunState.QUEUED, elsewhere=ELSEWHERE)), SETTINGS, NOW)
    assert decision.actions == (DeleteRun(-1, "job"), HoldJob(False))
    assert ELSEWHERE in decision.events[-1].message
