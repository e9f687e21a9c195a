"""What a kubelet writes into a pod's status: patches, made from the pod as the API server has it (JSON)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]


def now() -> str:
    """This moment as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Json:
    """A condition of a pod or a node that is new at this moment."""
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now()}


def readiness(status: str, reason: str = "") -> list[Json]:
    """The conditions of a pod on a node whose containers are ready, or aren't."""
    made = [condition(kind, "True") for kind in ("PodScheduled", "Initialized")]
    return [*made, *(condition(kind, status, reason) for kind in ("ContainersReady", "Ready"))]


def running(pod: Json, ip: str) -> Json:
    """Init containers are done, all containers run and are ready, at `ip`."""
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
    """The containers end with `exit_code`; with `container`, that one alone, and the others with 0.

    After an init container's failure, the containers never start.
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
    """The pod is on a node that cannot start its containers."""
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        "phase": "Pending",
        "startTime": now(),
        "conditions": readiness("False", "ContainersNotReady"),
        "containerStatuses": [_container(item, state) for item in containers(pod)],
    }


def containers(pod: Json) -> list[Json]:
    """The pod's containers, as its spec has them."""
    found: list[Json] = pod["spec"]["containers"]
    return found


def inits(pod: Json) -> list[Json]:
    """The pod's init containers, as its spec has them."""
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
