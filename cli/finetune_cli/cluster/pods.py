"""Pods of a run of a job: selection by node, and state."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from finetune_api.labels import (
    CONTAINER,
    JOB_LABEL,
    NODE_INDEX_LABEL,
    PREFLIGHT,
    ROLE_LABEL,
    RUN_LABEL,
    WORKER,
)
from finetune_cli.cluster.connection import Query

Json = dict[str, Any]


def pods_path(namespace: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/pods"


def log_path(pod: Json) -> str:
    metadata = pod["metadata"]
    return f"{pods_path(metadata['namespace'])}/{quote(metadata['name'], safe='')}/log"


def selector(job: str, run: int) -> Query:
    """Return the label selector of the pods of a run. Run 0 is the preflight."""
    return {"labelSelector": f"{JOB_LABEL}={job},{RUN_LABEL}={run or PREFLIGHT}"}


def run_title(run: int) -> str:
    return f"attempt {run}" if run else "the preflight"


def by_node(pods: list[Json]) -> dict[int, Json]:
    """Return the latest pod of each node, by the index of the node. Node 0 has the driver.

    Workers that their engine does not number follow in the order of their creation.
    """
    found: dict[int, Json] = {}
    for pod in sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"])):
        worker = (pod["metadata"].get("labels") or {}).get(ROLE_LABEL) == WORKER
        found[max(found, default=0) + 1 if worker else _node_index(pod)] = pod
    return found


def _node_index(pod: Json) -> int:
    """Return the number of the node; a pod without a number is the only one of its run, or has the driver."""
    metadata = pod["metadata"]
    marks = {**(metadata.get("annotations") or {}), **(metadata.get("labels") or {})}
    index = str(marks.get(NODE_INDEX_LABEL, 0))
    return int(index) if index.isdecimal() else 0


def has_started(pod: Json) -> bool:
    """Return whether the trainer container has started: before that there is no log."""
    return bool({"running", "terminated"} & _state(pod).keys())


def has_ended(pod: Json) -> bool:
    """Return whether the log is complete."""
    return "terminated" in _state(pod) or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def trouble(pod: Json) -> str:
    """Return why a pod has not started, or an empty string."""
    status = pod.get("status") or {}
    waiting = _state(pod).get("waiting")
    unscheduled = (item for item in status.get("conditions") or [] if item.get("type") == "PodScheduled")
    for item in filter(None, (waiting, *unscheduled, status)):
        if item.get("reason") and item.get("status") != "True":
            return f"{item['reason']}: {item.get('message', '')}".removesuffix(": ")
    return ""


def _state(pod: Json) -> Json:
    """Return the state of the trainer container."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((item.get("state") or {} for item in statuses if item.get("name") == CONTAINER), {})
