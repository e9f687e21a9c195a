"""The operator's pod, as the chart installs it."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, Protocol

from support.cluster.access import Access
from support.e2e import cgroups

Json = dict[str, Any]
START_SECONDS = 120


class HasImages(Protocol):
    """The images and names of a cluster that the chart's values need."""

    operator_image: str
    trainer_image: str


def chart_values(cluster: HasImages) -> Json:
    """Return values with images that are present already, and with short pauses."""
    jobs = {
        "allowHostPath": True,
        "networkPolicy": True,
        "image": _image(cluster.trainer_image),
        "preflight": {"cpu": "100m", "memory": "3Gi"},
        "backoffSeconds": 1,
    }
    return {
        "image": _image(cluster.operator_image),
        "jobs": jobs,
        "operator": {"pollSeconds": 1, "statusSeconds": 1},
        "readinessProbe": {"periodSeconds": 1},
    }


def _image(reference: str) -> Json:
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "Never"}


class OperatorPod:
    """The only pod of the chart's Deployment.

    Args:
        namespace: of the release.
    """

    def __init__(self, admin: Access, namespace: str) -> None:
        self.admin, self.namespace = admin, namespace

    def kill(self) -> None:
        """Kill the operator with SIGKILL; the kubelet starts it again."""
        before = self._restarts()
        for pid in cgroups.processes(self._pod()["metadata"]["uid"]):
            if "finetune_operator" in cgroups.command_of(pid):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + START_SECONDS
        while self._restarts() <= before or not self._ready():
            assert time.monotonic() < deadline, "the operator does not come back"
            time.sleep(0.2)

    def log(self) -> str:
        return self.admin.kubectl("logs", f"--namespace={self.namespace}", self._pod()["metadata"]["name"]).stdout

    def _pod(self) -> Json:
        selector = "--selector=app.kubernetes.io/name=finetune-operator"
        done = self.admin.kubectl("get", "pods", f"--namespace={self.namespace}", selector, "--output=json")
        pods = [pod for pod in json.loads(done.stdout)["items"] if "deletionTimestamp" not in pod["metadata"]]
        found: Json = pods[0]
        return found

    def _container(self) -> Json:
        return next(iter(self._pod()["status"].get("containerStatuses", [])), {})

    def _restarts(self) -> int:
        return int(self._container().get("restartCount", 0))

    def _ready(self) -> bool:
        return bool(self._container().get("ready"))
