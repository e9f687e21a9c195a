"""Engine `job`: one Indexed Job per attempt. Each pod is a node; pod 0 runs the Ray head and the driver."""

from __future__ import annotations

from typing import Any

from finetune_api.exit_codes import ExitCode
from finetune_api.labels import NODE_INDEX_LABEL
from finetune_operator.core import names
from finetune_operator.core.snapshot import EngineStatus, PodNode, RunState, RunView, controller_of, run_view
from finetune_operator.engines.engine import Engine
from finetune_operator.render.pods import NODE_COMMAND, RUN_CONFIG, pod_template
from finetune_operator.render.run import Run

Json = dict[str, Any]
NAME = "job"
HELPER_COMMANDS = {
    names.PREFLIGHT_RUN: ["finetune", "preflight", "--run-config", RUN_CONFIG],
    names.CLEANUP_RUN: ["finetune", "cleanup", "--run-config", RUN_CONFIG],
}
HELPER_RETRIES = 2
_DISRUPTION = "DisruptionTarget"
_FAIL_ON_DISRUPTION: Json = {
    "action": "FailJob",
    "onPodConditions": [{"type": _DISRUPTION, "status": "True"}],
}
_FINAL_CODES = [code.value for code in (ExitCode.USER_ERROR, ExitCode.OUT_OF_MEMORY, ExitCode.GATE_NOT_PASSED)]
"""Not INTERRUPTED: the pods of a Job that a queue suspends end with that code, and the Job must not fail by it, because
the queue admits it again later."""
_OWN_CONTROLLER = "kubernetes.io/job-controller"


def render(run: Run) -> Json:
    """Return the Job of an attempt, a preflight or a clean-up."""
    spec = _attempt_spec(run) if run.is_attempt else _helper_spec(run)
    metadata = run.metadata(run.name)
    least = str(run.resources.min_nodes or run.nodes)
    metadata["annotations"] = {names.LEAST_ANNOTATION: least}
    if run.is_attempt and int(least) < run.nodes:
        metadata["annotations"] |= {names.PARTIAL_ANNOTATION: least, names.EQUAL_ANNOTATION: "true"}
    metadata["labels"] |= run.queue_labels
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _attempt_spec(run: Run) -> Json:
    template = pod_template(run, NODE_COMMAND)
    template["spec"]["subdomain"] = run.support
    return {
        "completionMode": "Indexed",
        "completions": run.nodes,
        "parallelism": run.nodes,
        "backoffLimit": 0,  # the operator retries
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},  # the attempt succeeds when its driver does
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [_fail_on(_FINAL_CODES), _FAIL_ON_DISRUPTION]},
        "template": template,
    }


def _helper_spec(run: Run) -> Json:
    """Return the spec of a preflight or a clean-up: one pod without GPUs."""
    ignore_disruption = {**_FAIL_ON_DISRUPTION, "action": "Ignore"}
    return {
        "backoffLimit": HELPER_RETRIES,  # a helper has no checkpoint, so the Job controller can retry it
        "ttlSecondsAfterFinished": 86400,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [_fail_on([ExitCode.USER_ERROR.value]), ignore_disruption]},
        "template": pod_template(run, HELPER_COMMANDS[run.number], gpus=False),
    }


def _fail_on(codes: list[int]) -> Json:
    """Return the rule that fails the Job on these exit codes. Its message keeps the code when the pod is gone."""
    values = {"containerName": names.CONTAINER, "operator": "In", "values": sorted(codes)}
    return {"action": "FailJob", "onExitCodes": values}


def observe(body: Json) -> RunView | None:
    """Return the state of a Job; None for a Job that this operator does not manage."""
    status = body.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or [] if item.get("status") == "True"}
    state, condition = _state(body, status, conditions)
    ended = status.get("completionTime") or condition.get("lastTransitionTime")
    message = condition.get("message", "")
    manager = (body.get("spec") or {}).get("managedBy") or _OWN_CONTROLLER
    return run_view(
        body,
        NAME,
        state,
        EngineStatus(condition.get("reason", ""), message, ended),
        pods_owner=str(body["metadata"].get("uid", "")),
        elsewhere="" if manager == _OWN_CONTROLLER else manager,
        disrupted=_DISRUPTION in message,
    )


def _state(body: Json, status: Json, conditions: dict[str, Json]) -> tuple[RunState, Json]:
    """Return the state and the condition that explains it.

    A Job has failed only when all of its pods are gone: until then they may save a checkpoint.
    """
    if "Complete" in conditions or "SuccessCriteriaMet" in conditions:
        return RunState.SUCCEEDED, conditions.get("Complete") or conditions["SuccessCriteriaMet"]
    if "Failed" in conditions:
        return RunState.FAILED, conditions["Failed"]
    if (body.get("spec") or {}).get("suspend"):
        held = {"message": "the queue has not admitted it yet"}
        return RunState.QUEUED, conditions.get("Suspended", held) | held
    least = int((body["metadata"].get("annotations") or {}).get(names.LEAST_ANNOTATION, 1))
    return (RunState.RUNNING if (status.get("ready") or 0) >= least else RunState.PENDING), {}


def locate(metadata: Json) -> PodNode | None:
    """Return the node of a pod that a Job created. The pod of a helper has no index and is node 0."""
    controller = controller_of(metadata)
    if controller.get("kind") != "Job":
        return None
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    index = str(marks.get(NODE_INDEX_LABEL, 0))
    return PodNode(int(index) if index.isdecimal() else 1, str(controller.get("uid", "")))


ENGINE = Engine(
    name=NAME,
    kind="Job",
    plural="jobs",
    group="batch",
    version="v1",
    render=render,
    observe=observe,
    locate=locate,
    own_labels=("batch.kubernetes.io/", "job-name", "controller-uid"),
    create_failures=("FailedCreate",),
    runs_helpers=True,
)
