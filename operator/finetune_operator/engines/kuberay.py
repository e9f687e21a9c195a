"""Engine `kuberay`: one RayJob per attempt, for clusters that have KubeRay. The head is a node like the others."""

from __future__ import annotations

from typing import Any

from finetune_operator import names
from finetune_operator.engines.engine import Engine
from finetune_operator.observed import RunState, RunView, Told, run_view
from finetune_operator.render.pods import pod_template
from finetune_operator.render.run import Run

Json = dict[str, Any]
ENTRYPOINT = f"finetune drive --run-config {names.CONFIG_DIRECTORY}/{names.CONFIG_FILE}"
_OWN_AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "FINETUNE_HEAD_ADDRESS")
_STATES = {"Running": RunState.RUNNING, "Suspended": RunState.QUEUED, "Failed": RunState.FAILED}


def render(run: Run) -> Json:
    """The RayJob of an attempt."""
    metadata = run.metadata(run.name)
    metadata["labels"] |= run.queue_labels
    spec = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "HTTPMode",  # no submitter pod beside the nodes
        "backoffLimit": 0,  # retries are the operator's
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": _cluster(run),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _cluster(run: Run) -> Json:
    """KubeRay submits the driver once all replicas run: so an elastic job begins with its least, and whoever scales
    RayClusters there may add to it."""
    workers = run.nodes - 1
    least = (run.resources.min_nodes or run.nodes) - 1
    group = {
        "groupName": "workers",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": workers,
        "rayStartParams": {},
        "template": _template(run),
    }
    return {
        "rayVersion": run.settings.ray_version,
        "authOptions": {"mode": "token", "secretName": run.support},  # its key is KubeRay's own (names.TOKEN_KEY)
        "headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": _template(run)},
        "workerGroupSpecs": [group] if workers else [],
    }


def _template(run: Run) -> Json:
    """KubeRay puts in the command and Ray's token itself, and adds to what it finds: so nothing may be there."""
    template = pod_template(run, [])
    trainer = template["spec"]["containers"][0]
    for name in ("command", "args"):
        del trainer[name]
    trainer["env"] = [item for item in trainer["env"] if item.get("name") not in _OWN_AUTH]
    return template


def observe(body: Json) -> RunView | None:
    """How a RayJob stands."""
    status = body.get("status") or {}
    told = Told(status.get("reason", ""), status.get("message", ""), status.get("endTime"))
    return run_view(body, "kuberay", _state(body, status), told)


def _state(body: Json, status: Json) -> RunState:
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment == "Complete":  # STOPPED counts as complete there, and isn't here
        return RunState.SUCCEEDED if job == "SUCCEEDED" else RunState.FAILED
    if deployment == "ValidationFailed":
        return RunState.FAILED
    if (body.get("spec") or {}).get("suspend") and deployment in ("", "Suspended"):
        return RunState.QUEUED
    return _STATES.get(deployment, RunState.PENDING)


ENGINE = Engine("kuberay", "ray.io", "v1", "rayjobs", render, observe)
