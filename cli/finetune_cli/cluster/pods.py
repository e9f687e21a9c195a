"""Which pod of a job's run has the log that is asked for."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from finetune_api.labels import CONTAINER, JOB_LABEL, PREFLIGHT, RUN_LABEL
from finetune_cli.cluster.connection import Query

Json = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
RAY_NODE_TYPE = "ray.io/node-type"


def pods_path(namespace: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/pods"


def log_path(pod: Json) -> str:
    metadata = pod["metadata"]
    return f"{pods_path(metadata['namespace'])}/{quote(metadata['name'], safe='')}/log"


def selector(job: str, run: int) -> Query:
    """Of the pods of a run; run 0 is the preflight."""
    return {"labelSelector": f"{JOB_LABEL}={job},{RUN_LABEL}={run or PREFLIGHT}"}


def run_words(run: int) -> str:
    return f"attempt {run}" if run else "the preflight"


def node_index(pod: Json) -> int:
    """Which node of its run the pod is; KubeRay counts none, so its head is 0 and its workers follow by name."""
    metadata = pod["metadata"]
    known = metadata.get("labels", {}).get(INDEX) or metadata.get("annotations", {}).get(INDEX)
    if known is not None and known.isdecimal():
        return int(known)
    return 1 if metadata.get("labels", {}).get(RAY_NODE_TYPE) == "worker" else 0


def by_node(pods: list[Json]) -> dict[int, Json]:
    """The newest pod of each node."""
    found: dict[int, Json] = {}
    for pod in sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"])):
        index = node_index(pod)
        if RAY_NODE_TYPE in pod["metadata"].get("labels", {}) and index:
            index = max(found, default=0) + 1
        found[index] = pod
    return found


def has_started(pod: Json) -> bool:
    """Whether its trainer runs or ran: before that there is no log."""
    return bool({"running", "terminated"} & _state(pod).keys())


def has_ended(pod: Json) -> bool:
    """Whether its log grows no more."""
    return "terminated" in _state(pod) or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def trouble(pod: Json) -> str:
    """Why a pod has not begun; empty where nothing says."""
    status = pod.get("status") or {}
    waiting = _state(pod).get("waiting")
    unplaced = (item for item in status.get("conditions") or [] if item.get("type") == "PodScheduled")
    for item in filter(None, (waiting, *unplaced, status)):
        if item.get("reason") and item.get("status") != "True":
            return f"{item['reason']}: {item.get('message', '')}".removesuffix(": ")
    return ""


def _state(pod: Json) -> Json:
    """State of the trainer's container."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((item.get("state") or {} for item in statuses if item.get("name") == CONTAINER), {})
