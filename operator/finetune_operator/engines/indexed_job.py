"""Engine `job`: one Indexed Job per attempt. A pod is a node; pod 0 runs the Ray head and the driver."""

from __future__ import annotations

from typing import Any

from finetune_api.exit_codes import ExitCode
from finetune_operator.core import names
from finetune_operator.core.snapshot import RunState, RunView, Told, run_view
from finetune_operator.engines.engine import Engine
from finetune_operator.render.pods import pod_template
from finetune_operator.render.run import Run

Json = dict[str, Any]
_CONFIG = f"{names.CONFIG_DIRECTORY}/{names.CONFIG_FILE}"
NODE_COMMAND = ["finetune", "node", "--run-config", _CONFIG]
HELPER_COMMANDS = {
    names.PREFLIGHT_RUN: ["finetune", "preflight", "--run-config", _CONFIG],
    names.CLEANUP_RUN: ["finetune", "cleanup", "--run-config", _CONFIG],
}
HELPER_RETRIES = 2
_DISRUPTED: Json = {
    "action": "FailJob",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
}
_TELLING = [code.value for code in (ExitCode.USER_ERROR, ExitCode.OUT_OF_MEMORY, ExitCode.GATE_NOT_PASSED)]
"""Not INTERRUPTED: a Job that a queue suspends ends its pods by that code, and would fail once it is admitted again."""
_OWN_CONTROLLER = "kubernetes.io/job-controller"


def render(run: Run) -> Json:
    """The Job of an attempt, of the preflight, or of the clean-up."""
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
        "backoffLimit": 0,  # retries are the operator's
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},  # the driver's word is the attempt's
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [_fail_on(_TELLING), _DISRUPTED]},
        "template": template,
    }


def _helper_spec(run: Run) -> Json:
    """A preflight or a clean-up: one pod, no GPU."""
    return {
        "backoffLimit": HELPER_RETRIES,  # no checkpoint to go on from, so Kubernetes' own retries will do
        "ttlSecondsAfterFinished": 86400,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [_fail_on([ExitCode.USER_ERROR.value]), {**_DISRUPTED, "action": "Ignore"}]},
        "template": pod_template(run, HELPER_COMMANDS[run.number], gpus=False),
    }


def _fail_on(codes: list[int]) -> Json:
    """The Job's own message then names the exit code, which outlives the pod."""
    values = {"containerName": names.CONTAINER, "operator": "In", "values": sorted(codes)}
    return {"action": "FailJob", "onExitCodes": values}


def observe(body: Json) -> RunView | None:
    """How a Job stands."""
    status = body.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or [] if item.get("status") == "True"}
    state, telling = _state(body, status, conditions)
    ended = status.get("completionTime") or telling.get("lastTransitionTime")
    told = Told(telling.get("reason", ""), telling.get("message", ""), ended)
    manager = (body.get("spec") or {}).get("managedBy") or _OWN_CONTROLLER
    elsewhere = "" if manager == _OWN_CONTROLLER else manager
    return run_view(body, "job", state, told, pods_owner=str(body["metadata"].get("uid", "")), elsewhere=elsewhere)


def _state(body: Json, status: Json, conditions: dict[str, Json]) -> tuple[RunState, Json]:
    """The state, and the condition that tells of it. Failure counts once all pods are gone: until then they may save
    a checkpoint."""
    if "Complete" in conditions or "SuccessCriteriaMet" in conditions:
        return RunState.SUCCEEDED, conditions.get("Complete") or conditions["SuccessCriteriaMet"]
    if "Failed" in conditions:
        return RunState.FAILED, conditions["Failed"]
    if (body.get("spec") or {}).get("suspend"):
        held = {"message": "the queue has not admitted it yet"}
        return RunState.QUEUED, conditions.get("Suspended", held) | held
    least = int((body["metadata"].get("annotations") or {}).get(names.LEAST_ANNOTATION, 1))
    return (RunState.RUNNING if (status.get("ready") or 0) >= least else RunState.PENDING), {}


ENGINE = Engine("job", "batch", "v1", "jobs", render, observe)
