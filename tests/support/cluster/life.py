"""A complete lifecycle of a job, driven by events: preflight, a crash, a suspension, success."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client, watch
from support.cluster.finetune_jobs import Driver, Jobs, driver
from support.cluster.kubelet_stand_in import KubeletStandIn

from finetune_operator.core.names import JOB_LABEL, RUN_LABEL

PLAN = json.dumps({"plan": {"parameters": 35936, "steps": 20}})
CRASH = json.dumps({"exitCode": 1, "message": "RuntimeError: a crash"})
PATIENCE = 120
"""Seconds for one step, in which a killed operator may have to restart on a busy machine."""
SUSPENDED_AT = 2
"""The attempt in which the job is suspended; the one before crashes, the one after succeeds."""


class Life:
    """A thread that acts as kubelet, trainer and user of one job until it succeeds or the test ends.

    Args:
        ip: the address of the drivers, which differs between jobs that run at the same time.
    """

    def __init__(self, jobs: Jobs, core: client.CoreV1Api, uid: str, ip: str, name: str = "tiny") -> None:
        self.jobs, self.core, self.uid, self.ip, self.name = jobs, core, uid, ip, name
        self.pods: dict[str, list[str]] = {}
        """Names of all pods that have existed, by run."""
        self.error: BaseException | None = None
        self._kubelet = KubeletStandIn(core)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)

    @contextmanager
    def going_on(self) -> Iterator[Life]:
        self._thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._thread.join(15)
            if self.error is not None:  # this error explains why the test waited in vain
                self.error.add_note(f"in the life of {self.name}, whose pods were {self.pods}")
                raise self.error

    def _play(self) -> None:
        try:
            while not self._over.is_set():
                query = {"namespace": self.jobs.namespace, "label_selector": f"{JOB_LABEL}={self.name}"}
                for event in watch.Watch().stream(self.core.list_namespaced_pod, timeout_seconds=2, **query):
                    if event["type"] == "ADDED":
                        self._new_pod(event["object"])
                    if self._over.is_set():
                        return
        except BaseException as error:
            self.error = error

    def _new_pod(self, pod: Any) -> None:
        run, name = pod.metadata.labels[RUN_LABEL], pod.metadata.name
        known = self.pods.setdefault(run, [])
        if name in known:
            return
        known.append(name)
        namespace = self.jobs.namespace
        if run == "preflight":
            self._kubelet.running(namespace, name)
            self._kubelet.finished(namespace, name, message=PLAN)
            return
        with driver(self.uid, int(run), self.ip) as trainer:
            self._kubelet.running(namespace, name, ip=self.ip)
            self._until(lambda status: status.get("phase") == "Running" and status.get("attempt") == int(run))
            self._train(int(run), trainer, name)

    def _train(self, run: int, trainer: Driver, pod: str) -> None:
        namespace = self.jobs.namespace
        trainer.reporter.checkpoint_saved(1, run, f"/pvc/c-{run}")
        self._until(lambda status: status.get("lastCheckpoint", {}).get("step") == run)
        if run < SUSPENDED_AT:
            self._kubelet.finished(namespace, pod, 1, message=CRASH)
        elif run == SUSPENDED_AT:
            self._suspend(trainer, pod)
        else:
            self._kubelet.finished(namespace, pod)

    def _suspend(self, trainer: Driver, pod: str) -> None:
        self.jobs.patch(self.name, {"runPolicy": {"suspend": True}})
        assert trainer.asked_to_stop.wait(PATIENCE), "nobody asked for a checkpoint"
        trainer.reporter.ended(75, "stopped, checkpoint saved")
        said = trainer.reporter.report().model_dump_json(by_alias=True, exclude_none=True)
        self._kubelet.finished(self.jobs.namespace, pod, 75, message=said)
        self._until(lambda status: status["phase"] == "Suspended")
        self.jobs.patch(self.name, {"runPolicy": {"suspend": False}})

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        self.jobs.until(wanted, self.name, PATIENCE)


def end_state(jobs: Jobs, life: Life) -> dict[str, Any]:
    """Return the part of the end state that must not depend on crashes of the operator."""
    status = jobs.read(life.name)["status"]
    return {
        "phase": status["phase"],
        "attempts": [(item["number"], item["reason"]) for item in status["attempts"]],
        "checkpoint": {name: value for name, value in status["lastCheckpoint"].items() if name != "savedAt"},
        "plan": status["plan"],
        "conditions": {item["type"]: (item["status"], item["reason"]) for item in status["conditions"]},
        "pods": {run: len(names) for run, names in life.pods.items()},
    }
