"""A stalled attempt: its status, the backoff count, and the node that the next attempt avoids."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest
from support.operator.worlds import NOW, VALID, attempt, body, conditions, pod, run, said, seen

from finetune_operator.core.conditions import Reason
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import RunState
from finetune_operator.decide.actions import Decision, StartRun
from finetune_operator.decide.attempts import failures
from finetune_operator.decide.classify import classify
from finetune_operator.decide.decide import decide
from finetune_operator.decide.stalls import stalled_nodes
from finetune_operator.engines import ENGINES
from finetune_operator.metrics import Metrics
from finetune_operator.render.run import Run

SETTINGS = Settings(backoff_seconds=10)
RUNNING = {"conditions": [*VALID, *conditions(Running="True/Training")], "attempts": [attempt(1)], "attempt": 1}
STALL = "no progress for 61 s; behind is worker 1 on node node-b (process 7): step 9, forward pass: stopped by a signal"
PODS = (pod(), pod(index=1, node="node-b"))


def condition(decision: Decision, kind: str) -> dict[str, Any]:
    return {item["type"]: item for item in decision.status["conditions"]}.get(kind, {})


def ended(**more: Any) -> tuple[Any, ...]:
    words = said(1, STALL, stalled=STALL, node="node-b", **more)
    return (pod(exit_code=1, phase="Failed", termination_message=words), PODS[1])


def test_the_condition_names_the_worker_and_its_pod_while_the_driver_looks_into_it() -> None:
    decision = decide(seen(RUNNING, run(), *PODS, report={"stalled": STALL, "node": "node-b"}), SETTINGS, NOW)
    found = condition(decision, "Stalled")
    assert (found["status"], found["reason"]) == ("True", "Stalled")
    assert found["message"] == f"{STALL} (pod tiny-1-1-x)"
    assert [event.reason for event in decision.events] == ["Stalled"] and decision.urgent


def test_it_is_taken_back_once_training_goes_on() -> None:
    status = RUNNING | {"conditions": [*RUNNING["conditions"], *conditions(Stalled="True/Stalled")]}  # type: ignore[misc]
    waits = decide(seen(status, run(), *PODS, report={}), SETTINGS, NOW)
    assert condition(waits, "Stalled")["status"] == "True", "no step yet"
    goes_on = decide(seen(status, run(), *PODS, report={"current": 1, "step": {"step": 9, "total": 10}}), SETTINGS, NOW)
    assert condition(goes_on, "Stalled")["status"] == "False"
    assert "Stalled" not in {
        item["type"] for item in decide(seen(RUNNING, run(), *PODS), SETTINGS, NOW).status["conditions"]
    }


def test_the_end_is_classified_counted_and_tried_again() -> None:
    ending = classify(run(state=RunState.FAILED), ended(), None)
    assert (ending.reason, ending.retryable, ending.counts) == (Reason.STALLED, True, True)
    assert (ending.pod, ending.node, ending.stalled) == ("tiny-1-1-x", "node-b", True)
    decision = decide(seen(RUNNING, run(state=RunState.FAILED), *ended()), SETTINGS, NOW)
    (record,) = decision.status["attempts"]
    assert record["stalledNode"] == "node-b" and failures(decision.status) == 1
    assert condition(decision, "Stalled")["status"] == "True"


def test_a_node_that_none_of_the_run_s_pods_is_on_is_not_believed() -> None:
    words = said(1, STALL, stalled=STALL, node="kube-system-node")
    ending = classify(run(state=RunState.FAILED), (pod(exit_code=1, phase="Failed", termination_message=words),), None)
    assert ending.reason is Reason.STALLED and ending.node is None


def test_another_end_after_a_stall_that_was_overcome_is_no_stall() -> None:
    words = said(2, "the learning rate is wrong", stalled=STALL)
    ending = classify(run(state=RunState.FAILED), (pod(exit_code=2, phase="Failed", termination_message=words),), None)
    assert ending.reason is Reason.USER_ERROR


def stalled(number: int, node: str, seconds: float = 100) -> dict[str, Any]:
    return attempt(number, "Stalled", seconds, stalledNode=node)


def test_the_next_attempt_prefers_other_nodes_and_says_so() -> None:
    decision = decide(seen({"conditions": VALID, "attempts": [stalled(1, "node-b")]}), SETTINGS, NOW)
    assert decision.actions == (StartRun(2, (), ("node-b",)),)
    assert "prefers other nodes than node-b" in condition(decision, "Running")["message"]
    later = decide(seen(decision.status, run(2, RunState.PENDING)), SETTINGS, NOW)
    assert "prefers other nodes than node-b" in condition(later, "Running")["message"]


def test_only_the_last_stall_counts_so_that_no_job_runs_out_of_nodes() -> None:
    assert stalled_nodes({"attempts": [stalled(1, "node-a", 300), stalled(2, "node-b")]}) == ("node-b",)
    assert stalled_nodes({"attempts": [stalled(1, "node-a", 300), attempt(2, "PodDeleted", 9)]}) == ()


def test_the_preference_is_rendered_beside_the_template_s_own_affinity() -> None:
    template = {"spec": {"affinity": {"nodeAffinity": {PREFERRED: [OWN]}, "podAffinity": {"x": 1}}}}
    for engine in ENGINES.values():
        rendered = engine.render(Run(body(resources={"podTemplate": template}), 2, SETTINGS, ("bad",), ("node-b",)))
        affinity = found_in(rendered, "affinity")
        elsewhere = [{"key": "metadata.name", "operator": "NotIn", "values": ["node-b"]}]
        assert affinity["nodeAffinity"][PREFERRED] == [OWN, {"weight": 100, "preference": {"matchFields": elsewhere}}]
        assert "bad" in str(affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"])
        assert affinity["podAffinity"] == {"x": 1}


PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
OWN = {"weight": 1, "preference": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}


def found_in(value: Any, name: str) -> Any:
    """Return the first value of that name in nested JSON."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        return next(filter(None, (found_in(item, name) for item in value.values())), None)
    return next(filter(None, (found_in(item, name) for item in value)), None) if isinstance(value, list) else None


def test_a_slow_node_is_named_in_the_condition() -> None:
    step = {"step": 9, "total": 10, "slowNode": "node-b", "slowFactor": 1.84}
    decision = decide(seen(RUNNING, run(), *PODS, report={"current": 1, "step": step}), SETTINGS, NOW)
    assert condition(decision, "Running")["message"] == (
        "node node-b is slow: its workers take 1.8 times as long as the others"
    )


def test_prometheus_has_the_median_and_the_slowest_worker_of_running_jobs() -> None:
    metrics = Metrics()
    progress = {"step": 9, "total": 10, "stepSecondsMedian": 0.5, "stepSecondsMax": 0.9}
    metrics.seen(("team", "tiny"), body(), {"phase": "Running", "progress": progress})
    metrics.seen(("team", "alone"), body(), {"phase": "Running", "progress": {"step": 1, "total": 10}})
    text = generate_latest(metrics.registry).decode()
    labels = 'job_name="tiny",job_namespace="team"'
    assert f'finetune_job_step_seconds{{{labels},worker="median"}} 0.5' in text
    assert f'finetune_job_step_seconds{{{labels},worker="max"}} 0.9' in text
    assert 'finetune_job_step_seconds{job_name="alone"' not in text
    metrics.forget(("team", "tiny"))
    assert "finetune_job_step_seconds{" not in generate_latest(metrics.registry).decode()
