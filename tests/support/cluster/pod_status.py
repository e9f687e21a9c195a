"""Patches with the pod statuses that a kubelet writes, made from the pod on the API server (JSON)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]


def now() -> str:
    """Return the current time in the format of Kubernetes."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Json:
    """Return a condition of a pod or a node that changed at this moment."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}


def readiness(status: str, reason: str = "") -> list[Json]:
    """Return the conditions of a pod on a node whose containers are ready or not."""
    made = [condition(kind, "True") for kind in ("PodScheduled", "Initialized")]
    return [*made, *(condition(kind, status, reason) for kind in ("ContainersReady", "Ready"))]


def running(pod: Json, ip: str) -> Json:
    """Return the status of a pod whose init containers are done and whose containers are ready at `ip`."""
    started = {"running": {"startedAt": now()}}
    return {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "hostIP": "127.0.0.1",
        "startTime": now(),
        "conditions": readiness("True"),
        "initContainerStatuses": [_container(item, _terminated(0), ready=True) for item in inits(pod)],
        "containerStatuses": [_container(item, started, ready=True, started=True) for item in containers(pod)],
    }


def finished(pod: Json, exit_code: int, *, reason: str = "", message: str = "", container: str = "") -> Json:
    """Return the status after the containers ended with `exit_code`; with `container`, the others end with 0.

    After the failure of an init container, the containers never start.
    """

    def ended(item: Json) -> Json:
        code = exit_code if container in ("", item["name"]) else 0
        return _container(item, _terminated(code, reason if code else "", message if code == exit_code else ""))

    status = {
        "phase": "Failed" if exit_code else "Succeeded",
        "conditions": readiness("False", "PodFailed" if exit_code else "PodCompleted"),
        "containerStatuses": [ended(item) for item in containers(pod)],
    }
    if container in {item["name"] for item in inits(pod)}:
        never = {"waiting": {"reason": "PodInitializing"}}
        status["containerStatuses"] = [_container(item, never) for item in containers(pod)]
        status["initContainerStatuses"] = [ended(item) for item in inits(pod)]
    return status


def waiting(pod: Json, reason: str, message: str) -> Json:
    """Return the status of a pod on a node that cannot start its containers."""
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        "phase": "Pending",
        "startTime": now(),
        "conditions": readiness("False", "ContainersNotReady"),
        "containerStatuses": [_container(item, state) for item in containers(pod)],
    }


def containers(pod: Json) -> list[Json]:
    """Return the containers of the pod's spec."""
    found: list[Json] = pod["spec"]["containers"]
    return found


def inits(pod: Json) -> list[Json]:
    """Return the init containers of the pod's spec."""
    found: list[Json] = pod["spec"].get("initContainers") or []
    return found


def _terminated(exit_code: int, reason: str = "", message: str = "") -> Json:
    reason = reason or ("Error" if exit_code else "Completed")
    times = {"startedAt": now(), "finishedAt": now()}
    ended = {"exitCode": exit_code, "reason": reason, "message": message, "containerID": "containerd://0", **times}
    return {"terminated": ended}


def _container(item: Json, state: Json, *, ready: bool = False, started: bool = False) -> Json:
    identity = {"name": item["name"], "image": item["image"], "imageID": item["image"], "restartCount": 0}
    return {**identity, "state": state, "ready": ready, "started": started}
