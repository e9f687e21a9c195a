"""Engine `kuberay`: one RayJob per attempt, for clusters that have KubeRay. The head is a node like the others.

The pods run the same program as those of the engine `job` (annotation `ray.io/overwrite-container-cmd`): the head's
process starts Ray and the driver, keeps the driver's log and termination message, and hears SIGTERM. What KubeRay
submits to Ray waits for the driver's end and ends as it did.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from finetune_api.slots import LEAST_CPUS, offered
from finetune_operator import names
from finetune_operator.engines.engine import Engine
from finetune_operator.engines.indexed_job import NODE_COMMAND
from finetune_operator.observed import RunState, RunView, Told, run_view
from finetune_operator.render.pods import pod_template
from finetune_operator.render.run import Run
from finetune_operator.render.support import DASHBOARD_PORT

Json = dict[str, Any]
NAME = "kuberay"
ENTRYPOINT = "finetune await-driver"
ANNOTATIONS = {
    "ray.io/overwrite-container-cmd": "true",
    "ray.io/disable-provisioned-head-restart": "true",  # a new head knows nothing of the driver that was lost
}
_OWN_CONTROLLER = "ray.io/kuberay-operator"
_OWN_AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "FINETUNE_HEAD_ADDRESS")
_SHELL = "BASH_ENV"
_TELLING = {"ReplicaFailure": "True", "HeadPodReady": "False", "RayClusterProvisioned": "False"}
"""Conditions of a RayCluster that say why it does not begin, with the status in which they do."""
_STATES = {"Running": RunState.RUNNING, "Failed": RunState.FAILED, "ValidationFailed": RunState.FAILED}


def render(run: Run) -> Json:
    """Return the RayJob of an attempt."""
    metadata = run.metadata(run.name)
    metadata["labels"] |= run.queue_labels
    metadata["annotations"] = dict(ANNOTATIONS)
    spec = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "HTTPMode",  # no submitter pod beside the nodes
        "backoffLimit": 0,  # retries are the operator's
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": _cluster(run),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _cluster(run: Run) -> Json:
    """KubeRay's job begins once all replicas run: so an elastic job begins with `minNodes`; what scales
    RayClusters there may add to it."""
    workers = run.nodes - 1
    least = (run.resources.min_nodes or run.nodes) - 1
    group = {
        "groupName": "workers",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": workers,
        "rayStartParams": _share(run),
        "template": _template(run),
    }
    head = {"rayStartParams": {"dashboard-host": "0.0.0.0", **_share(run)}, "template": _template(run)}
    return {
        "rayVersion": run.settings.ray_version,
        "authOptions": {"mode": "token", "secretName": run.support},  # its key is KubeRay's own (names.TOKEN_KEY)
        "headGroupSpec": head,
        "workerGroupSpecs": [group] if workers else [],
    }


def _share(run: Run) -> Json:
    """Return what each node offers to Ray. KubeRay pastes the values into a shell command."""
    gpus = run.resources.gpus_per_node or 0
    return {"num-cpus": str(LEAST_CPUS), "num-gpus": str(gpus), "resources": shlex.quote(offered(run.resources))}


def _template(run: Run) -> Json:
    """KubeRay puts in Ray's token and address itself, and takes the head Service's ports from the first container.

    Its init container of each worker (`wait-gcs-ready`) has the trainer's environment and mounts. By `BASH_ENV` it ends
    at once, so that a worker loads its libraries while the head starts, as on the engine `job`.
    """
    template = pod_template(run, NODE_COMMAND)
    trainer = template["spec"]["containers"][0]
    trainer["ports"].append({"name": "dashboard", "containerPort": DASHBOARD_PORT})
    trainer["env"] = [item for item in trainer["env"] if item.get("name") not in _OWN_AUTH]
    if all(item.get("name") != _SHELL for item in trainer["env"]):  # the CRD refuses a name that comes twice
        trainer["env"].append({"name": _SHELL, "value": f"{names.CONFIG_DIRECTORY}/{names.SHELL_FILE}"})
    return template


def observe(body: Json) -> RunView | None:
    """Return how a RayJob stands."""
    status = body.get("status") or {}
    state = _state(body, status)
    words = "; ".join(_held_by(status)) if state is RunState.PENDING else status.get("message", "")
    told = Told(status.get("reason", ""), words, status.get("endTime"))
    cluster = str(status.get("rayClusterName", ""))
    manager = (body.get("spec") or {}).get("managedBy") or _OWN_CONTROLLER
    elsewhere = "" if manager == _OWN_CONTROLLER else manager
    pods = {"pods_owner": cluster, "pods_maker": cluster}
    return run_view(body, NAME, state, told, **pods, ends_with_driver=True, elsewhere=elsewhere)


def _state(body: Json, status: Json) -> RunState:
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment == "Complete":  # STOPPED counts as complete there, and isn't here
        return RunState.SUCCEEDED if job == "SUCCEEDED" else RunState.FAILED
    if (body.get("spec") or {}).get("suspend") and deployment != "Failed":
        return RunState.QUEUED
    if deployment == "Running" and not job:
        return RunState.PENDING
    return _STATES.get(deployment, RunState.PENDING)


def _held_by(status: Json) -> Iterator[str]:
    """Yield KubeRay's own words on what a RayJob that has not begun waits for."""
    deployment = status.get("jobDeploymentStatus", "")
    yield f"KubeRay: {deployment}" if deployment else "KubeRay has not taken the RayJob up yet"
    if deployment == "Running":
        yield "it has not submitted the job to Ray's dashboard yet"
    if status.get("message"):
        yield str(status["message"])
    for item in (status.get("rayClusterStatus") or {}).get("conditions") or []:
        if item.get("status") == _TELLING.get(item.get("type")):
            yield f"{item.get('type')}: {item.get('reason', '')}: {item.get('message', '')}".rstrip(": ")


ENGINE = Engine(NAME, "ray.io", "v1", "rayjobs", render, observe, needs_token_to_go=True)
