"""Engine `kuberay`: one RayJob per attempt, for clusters with KubeRay. The head pod is a node like the others.

The pods run the same program as those of the engine `job` (annotation `ray.io/overwrite-container-cmd`): the process of
the head pod starts Ray and the driver, so that it has the driver's log and termination message and receives SIGTERM.
The entrypoint that KubeRay submits to Ray waits for the driver's end and ends with its exit code.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from finetune_api.labels import DRIVER, ROLE_LABEL, WORKER
from finetune_api.slots import LEAST_CPUS, offered
from finetune_operator.core import names
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import EngineStatus, PodNode, RunState, RunView, controller_of, run_view
from finetune_operator.engines.engine import Engine
from finetune_operator.render.pods import NODE_COMMAND, pod_template
from finetune_operator.render.run import Run

Json = dict[str, Any]
NAME = "kuberay"
ENTRYPOINT = "finetune await-driver"
ANNOTATIONS = {
    "ray.io/overwrite-container-cmd": "true",
    "ray.io/disable-provisioned-head-restart": "true",  # a new head has no driver
}
DASHBOARD_PORT = 8265
_NODE_TYPE = "ray.io/node-type"
_OWN_CONTROLLER = "ray.io/kuberay-operator"
SHELL_FILE = "shell.sh"
SHELL = """# KubeRay's init container waits for the head with this command, at a fifth of a CPU. The node itself waits.
ray() { [ "$1" = health-check ] || command ray "$@"; }
"""
_SHELL_VARIABLE = "BASH_ENV"
"""Names the file that every bash of a pod reads first."""
_SET_BY_KUBERAY = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "FINETUNE_HEAD_ADDRESS")
_BLOCKING_CONDITIONS = {"ReplicaFailure": "True", "HeadPodReady": "False", "RayClusterProvisioned": "False"}
"""Conditions of a RayCluster that say why it does not start, with the status in which they say so."""
_STATES = {"Running": RunState.RUNNING, "Failed": RunState.FAILED, "ValidationFailed": RunState.FAILED}
_KUBERAY_PODS: Json = {
    "namespaceSelector": {},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
}


def render(run: Run) -> Json:
    """Return the RayJob of an attempt."""
    metadata = run.metadata(run.name)
    metadata["labels"] |= run.queue_labels
    metadata["annotations"] = dict(ANNOTATIONS)
    spec = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "HTTPMode",  # without a submitter pod
        "backoffLimit": 0,  # the operator retries
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": _cluster(run),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _cluster(run: Run) -> Json:
    """Return the spec of the RayCluster.

    KubeRay starts the job when all replicas run, so an elastic job starts with `minNodes`; an autoscaler of the
    RayCluster may add nodes.
    """
    workers = run.nodes - 1
    least = (run.resources.min_nodes or run.nodes) - 1
    group = {
        "groupName": "workers",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": workers,
        "rayStartParams": _ray_resources(run),
        "template": _template(run, WORKER),
    }
    head = {
        "rayStartParams": {"dashboard-host": "0.0.0.0", **_ray_resources(run)},
        "template": _template(run, DRIVER),
    }
    return {
        "rayVersion": run.settings.ray_version,
        "authOptions": {"mode": "token", "secretName": run.support},  # KubeRay reads the key names.TOKEN_KEY of it
        "headGroupSpec": head,
        "workerGroupSpecs": [group] if workers else [],
    }


def _ray_resources(run: Run) -> Json:
    """Return what each node offers to Ray. KubeRay pastes the values into a shell command."""
    gpus = run.resources.gpus_per_node or 0
    return {"num-cpus": str(LEAST_CPUS), "num-gpus": str(gpus), "resources": shlex.quote(offered(run.resources))}


def _template(run: Run, role: str) -> Json:
    """Return the pod template of the head or of the workers, without the variables that KubeRay sets itself.

    KubeRay takes the ports of the head Service from the first container. It gives its pods no index, so the role is a
    label of the operator's own. The init container that KubeRay adds to each worker (`wait-gcs-ready`) has the
    environment and the mounts of the trainer. With `BASH_ENV` it ends at once, so that a worker loads its libraries
    while the head starts, as on the engine `job`.
    """
    template = pod_template(run, NODE_COMMAND)
    template["metadata"]["labels"][ROLE_LABEL] = role
    trainer = template["spec"]["containers"][0]
    trainer["ports"].append({"name": "dashboard", "containerPort": DASHBOARD_PORT})
    trainer["env"] = [item for item in trainer["env"] if item.get("name") not in _SET_BY_KUBERAY]
    if all(item.get("name") != _SHELL_VARIABLE for item in trainer["env"]):  # the CRD refuses duplicate names
        trainer["env"].append({"name": _SHELL_VARIABLE, "value": f"{names.CONFIG_DIRECTORY}/{SHELL_FILE}"})
    return template


def observe(body: Json) -> RunView | None:
    """Return the state of a RayJob; None for a RayJob that this operator does not manage."""
    status = body.get("status") or {}
    state = _state(body, status)
    message = "; ".join(_blocked_by(status)) if state is RunState.PENDING else status.get("message", "")
    cluster = str(status.get("rayClusterName", ""))
    manager = (body.get("spec") or {}).get("managedBy") or _OWN_CONTROLLER
    return run_view(
        body,
        NAME,
        state,
        EngineStatus(status.get("reason", ""), message, status.get("endTime")),
        pods_owner=cluster,
        pods_maker=cluster,
        ends_with_driver=True,
        elsewhere="" if manager == _OWN_CONTROLLER else manager,
    )


def _state(body: Json, status: Json) -> RunState:
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment == "Complete":  # KubeRay also reports STOPPED as complete, which is a failure here
        return RunState.SUCCEEDED if job == "SUCCEEDED" else RunState.FAILED
    if (body.get("spec") or {}).get("suspend") and deployment != "Failed":
        return RunState.QUEUED
    if deployment == "Running" and not job:
        return RunState.PENDING
    return _STATES.get(deployment, RunState.PENDING)


def _blocked_by(status: Json) -> Iterator[str]:
    """Yield what a RayJob that has not started waits for, as KubeRay reports it."""
    deployment = status.get("jobDeploymentStatus", "")
    yield f"KubeRay: {deployment}" if deployment else "KubeRay has not taken the RayJob up yet"
    if deployment == "Running":
        yield "it has not submitted the job to Ray's dashboard yet"
    if status.get("message"):
        yield str(status["message"])
    for item in (status.get("rayClusterStatus") or {}).get("conditions") or []:
        if item.get("status") == _BLOCKING_CONDITIONS.get(item.get("type")):
            yield f"{item.get('type')}: {item.get('reason', '')}: {item.get('message', '')}".rstrip(": ")


def locate(metadata: Json) -> PodNode | None:
    """Return the node of a pod that a RayCluster created. All workers have index 1: KubeRay does not number them.

    The owner is the RayCluster's name, because that is what the status of a RayJob has.
    """
    controller = controller_of(metadata)
    if controller.get("kind") != "RayCluster":
        return None
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    return PodNode(0 if marks.get(_NODE_TYPE) == "head" else 1, str(controller["name"]))


def _start_seconds(settings: Settings) -> int:
    return settings.engine_seconds


ENGINE = Engine(
    name=NAME,
    kind="RayJob",
    plural="rayjobs",
    group="ray.io",
    version="v1",
    render=render,
    observe=observe,
    locate=locate,
    own_labels=("ray.io/",),
    config_files={SHELL_FILE: SHELL},
    ingress=({"from": [_KUBERAY_PODS], "ports": [{"port": DASHBOARD_PORT}]},),  # it submits the entrypoint there
    create_failures=("FailedCreate", "FailedToCreateHeadPod", "FailedToCreateWorkerPod"),
    start_seconds=_start_seconds,
    remedy="install KubeRay, or use job",
    deletion_reads_secret=True,
)
