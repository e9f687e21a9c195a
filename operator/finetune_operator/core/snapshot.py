"""The snapshot of a job that decisions are made from: the job, its runs and its pods, in terms of no engine."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from finetune_api.labels import CONTAINER, JOB_LABEL
from finetune_api.problems import Problem
from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason, moment
from finetune_operator.core.names import mark_of, run_of

Json = dict[str, Any]
_EXIT_CODE = re.compile(r"exit code:? (-?\d+)")


class RunState(Enum):
    """The state of a run, the same for all engines."""

    QUEUED = "queued"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


ENDED = (RunState.SUCCEEDED, RunState.FAILED)


@dataclass(frozen=True, slots=True)
class PodNode:
    """What an engine knows about one of its pods."""

    index: int
    """Number of the node in its run; node 0 has the driver."""
    owner: str
    """Identity of the object that created the pod, as `RunView.pods_owner` has it."""


@dataclass(frozen=True, slots=True)
class PodView:
    """The part of a pod that decisions need. The pod with `index` 0 has the driver."""

    name: str
    job: str
    run: int
    index: int
    phase: str
    owner: str = ""
    """As of `PodNode`."""
    created: str = ""
    """RFC 3339."""
    ip: str | None = None
    node: str | None = None
    grace_over: datetime | None = None
    """End of the grace period of a pod that is being deleted; None for any other pod."""
    forced: bool = False
    """Whether the pod was deleted without a grace period while its containers ran."""
    gone: bool = False
    """Whether the pod object is deleted. It is kept because it may say why its run ended."""
    ready: bool = True
    """The condition Ready. The control plane sets it to False or Unknown when the node stops answering."""
    ready_since: str = ""
    """RFC 3339; empty for a pod that is not ready."""
    reason: str | None = None
    """Reason of the pod's status, such as `Evicted` or `NodeLost`."""
    message: str = ""
    unschedulable: str | None = None
    """The scheduler's message for a pod that fits on no node."""
    disruption: str | None = None
    """Reason of the condition `DisruptionTarget`."""
    waiting: tuple[str, str] | None = None
    """Reason and message of a container that cannot start."""
    terminated: str | None = None
    """Reason why the trainer's container terminated, such as `OOMKilled` or `Error`."""
    exit_code: int | None = None
    termination_message: str = ""
    checkpoint: str = ""
    """The checkpoint in its annotations (`decide.checkpoint_annotations`)."""
    failed_container: str = ""
    """Name of another container that failed while the trainer's had not terminated. `terminated`, `exit_code` and
    `termination_message` are then of that container."""

    @property
    def runs(self) -> bool:
        """Whether the pod runs and nothing says that it ends."""
        return self.phase == "Running" and not self.gone and self.grace_over is None and self.exit_code is None

    @property
    def over(self) -> bool:
        """Whether all containers have terminated, or the pod is deleted."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    @property
    def ended(self) -> bool:
        """Whether the trainer's container has terminated, or a pod that had started is over."""
        return self.exit_code is not None or (self.over and self.phase != "Pending")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run: an attempt (1, 2, ...), the preflight or the clean-up (`names.PREFLIGHT_RUN`, `CLEANUP_RUN`)."""

    name: str
    job: str
    owner: str
    """Uid of the FineTuneJob that owns it."""
    run: int
    state: RunState
    created: datetime
    engine: str = ""
    """Name of the engine that runs it."""
    pods_owner: str = ""
    """The `owner` of its pods. A pod with the run's labels and another owner is not the run's."""
    pods_maker: str = ""
    """Name of the object whose events say why pods are not created; empty where that is the run's main object."""
    ends_with_driver: bool = False
    """Whether the run is over when the driver's pod is, although its engine would keep it running."""
    orphaned: bool = False
    """Whether the driver's pod has ended and the engine still reports the run as running."""
    elsewhere: str = ""
    """The controller that manages it, where that is not one of this cluster: MultiKueue runs it in another cluster."""
    uid: str = ""
    version: int = field(default=0, compare=False)
    """The object's resourceVersion as a number: the larger one is the newer (KEP-5504)."""
    ended: datetime | None = None
    deleting: bool = False
    reason: str = ""
    """The engine's reason of a failure."""
    message: str = ""
    """The engine's message: why the run failed, or what a run that has not started waits for."""
    disrupted: bool = False
    """Whether the engine says that the run failed because a pod was evicted, preempted or drained."""
    exit_code: int | None = None
    """The exit code in the engine's message, for runs whose pods are gone."""
    checkpoint: str = ""
    """As of `PodView`."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine says about a run: why it ended, or what it waits for. The message may have an exit code."""

    reason: str = ""
    message: str = ""
    ended: str | None = None
    """RFC 3339."""


@dataclass(frozen=True)
class EngineFacts:
    """What decisions need to know of engines (`engines.registry.facts`)."""

    missing: str = ""
    """Why the engine that the job requests is not available here; empty where it is."""
    refusals: tuple[Problem, ...] = ()
    """What the job asks for that its engine cannot do."""
    start_seconds: Mapping[str, int] = field(default_factory=dict)
    """How long each engine may take to start an attempt whose pods are ready, in seconds; 0 is no limit."""
    own_labels: tuple[str, ...] = ()
    """Prefixes of the labels and annotations of pods that belong to the controllers of the engines."""


@dataclass(frozen=True)
class JobView:
    """A FineTuneJob as the API server has it, compressed: thousands of parsed specs would take much more memory."""

    namespace: str
    name: str
    uid: str
    version: int
    packed: bytes = field(repr=False)

    @property
    def body(self) -> Json:
        body: Json = json.loads(zlib.decompress(self.packed))
        return body


@dataclass(frozen=True)
class Complaint:
    """The reason and message of a warning event about a run that has not started."""

    reason: str
    message: str
    pods_refused: bool = False
    """Whether it says that the run's pods cannot be created."""


@dataclass(frozen=True)
class Trouble:
    """The API server refused an object of a run: permanently (`REJECTED`), or at least until `again`."""

    reason: Reason
    message: str
    again: datetime


@dataclass(frozen=True)
class Observed:
    """The snapshot that a decision is made from."""

    body: Json
    runs: tuple[RunView, ...] = ()
    pods: tuple[PodView, ...] = ()
    report: AttemptReport | None = None
    """The last report of the newest attempt."""
    engines: EngineFacts = EngineFacts()
    trouble: Trouble | None = None
    """Why the API server refused an object of a run when it was last applied."""
    complaints: tuple[Complaint, ...] = ()
    """About the run that is to start, newest first. They are read only where nothing else says what blocks it."""

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    def run(self, number: int) -> RunView | None:
        return next((run for run in self.runs if run.run == number and run.owner == self.uid), None)

    def pods_of(self, number: int) -> tuple[PodView, ...]:
        """Return the pods that a run of this job created, by index; among pods of one index the newest is first."""
        run = self.run(number)
        owned = (pod for pod in self.pods if run is not None and pod.run == number and pod.owner == run.pods_owner)
        newest = sorted(owned, key=lambda pod: (pod.created, pod.name), reverse=True)
        return tuple(sorted(newest, key=lambda pod: pod.index))


def job_view(body: Json) -> JobView:
    """Return a FineTuneJob without the fields that the operator does not read."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    slim = {"metadata": metadata, "spec": body.get("spec", {}), "status": body.get("status", {})}
    packed = zlib.compress(json.dumps(slim, separators=(",", ":")).encode(), level=1)
    return JobView(metadata["namespace"], metadata["name"], metadata["uid"], int(metadata["resourceVersion"]), packed)


def pod_view(body: Json, node: PodNode) -> PodView | None:
    """Return a pod of a run; None for any other pod.

    Args:
        body: the Pod.
        node: what the pod's engine knows about it.
    """
    metadata, status = body["metadata"], body.get("status", {})
    run = run_of(metadata)
    job = (metadata.get("labels") or {}).get(JOB_LABEL)
    if run is None or job is None:
        return None
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    container, ended = _terminated(status)
    at_once = metadata.get("deletionGracePeriodSeconds") == 0
    return PodView(
        name=metadata["name"],
        job=job,
        run=run,
        index=node.index,
        phase=status.get("phase", "Pending"),
        owner=node.owner,
        created=metadata.get("creationTimestamp", ""),
        ip=status.get("podIP"),
        node=(body.get("spec") or {}).get("nodeName"),
        grace_over=moment(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        forced=at_once and status.get("phase") == "Running" and not ended,
        ready=conditions.get("Ready", {}).get("status") == "True",
        ready_since=_since(conditions.get("Ready", {})),
        reason=status.get("reason"),
        message=status.get("message", ""),
        unschedulable=_condition_text(conditions.get("PodScheduled"), "False", "Unschedulable"),
        disruption=_reason(conditions.get("DisruptionTarget"), "True"),
        waiting=_waiting(status),
        terminated=ended.get("reason"),
        exit_code=ended.get("exitCode"),
        termination_message=ended.get("message", ""),
        checkpoint=mark_of(metadata.get("annotations") or {}),
        failed_container="" if container == CONTAINER else container,
    )


def run_view(body: Json, engine: str, state: RunState, said: EngineStatus, **fields: Any) -> RunView | None:
    """Return the main object of a run as a view; None for an object that this operator does not manage.

    Args:
        body: the main object.
        engine: name of the engine.
        state: the state of the run.
        said: what the engine says about it.
        fields: the fields of `RunView` that only the engine knows.
    """
    metadata = body["metadata"]
    run, job = run_of(metadata), (metadata.get("labels") or {}).get(JOB_LABEL)
    if run is None or job is None:
        return None
    over = state in (RunState.SUCCEEDED, RunState.FAILED)
    code = _EXIT_CODE.search(said.message)
    return RunView(
        name=metadata["name"],
        job=job,
        owner=owner_uid(metadata),
        run=run,
        state=state,
        created=created(metadata),
        version=int(metadata.get("resourceVersion", 0)),
        engine=engine,
        uid=str(metadata.get("uid", "")),
        ended=moment(said.ended) if over and said.ended else None,
        deleting="deletionTimestamp" in metadata,
        reason=said.reason,
        message=said.message,
        exit_code=_shell_code(int(code[1])) if code else None,
        checkpoint=mark_of(metadata.get("annotations") or {}),
        **fields,
    )


def _shell_code(code: int) -> int:
    """Return the code as a container reports it: for a process that signal 9 killed, Ray says -9, Kubernetes 137."""
    return code if code >= 0 else 128 - code


def _containers(status: Json) -> list[Json]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _terminated(status: Json) -> tuple[str, Json]:
    """Return the terminated state of the trainer's container, or else of the first other container that failed."""
    ends = {item["name"]: (item.get("state") or {}).get("terminated") or {} for item in _containers(status)}
    failed = ((name, end) for name, end in ends.items() if end.get("exitCode"))
    own = ends.get(CONTAINER)
    return (CONTAINER, own) if own else next(failed, (CONTAINER, {}))


def _waiting(status: Json) -> tuple[str, str] | None:
    for item in _containers(status):
        waiting = (item.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return waiting["reason"], waiting.get("message", "")
    return None


def _since(condition: Json) -> str:
    return str(condition.get("lastTransitionTime") or "") if condition.get("status") == "True" else ""


def _condition_text(condition: Json | None, status: str, reason: str) -> str | None:
    if condition is None or condition.get("status") != status or condition.get("reason") != reason:
        return None
    return str(condition.get("message", ""))


def _reason(condition: Json | None, status: str) -> str | None:
    return str(condition.get("reason", "")) if condition and condition.get("status") == status else None


def created(metadata: Json) -> datetime:
    """Return when the API server created an object."""
    return moment(metadata["creationTimestamp"])


def controller_of(metadata: Json) -> Json:
    """Return the owner reference of an object's controller; empty for an object without one."""
    owners = metadata.get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), {})


def owner_uid(metadata: Json) -> str:
    """Return the uid of the controller that owns an object; empty for an object without one."""
    return str(controller_of(metadata).get("uid", ""))
