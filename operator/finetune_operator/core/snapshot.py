"""What is seen of a job and its runs, without any engine's own words."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from finetune_api.labels import CONTAINER, JOB_LABEL
from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason, moment
from finetune_operator.core.names import mark_of, run_of

Json = dict[str, Any]
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
_EXIT_CODE = re.compile(r"exit code:? (-?\d+)")
RAY_NODE_TYPE = "ray.io/node-type"


class RunState(Enum):
    """How a run stands, in the words of no engine."""

    QUEUED = "queued"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


ENDED = (RunState.SUCCEEDED, RunState.FAILED)


@dataclass(frozen=True, slots=True)
class PodView:
    """The part of a pod that decisions need. `index` 0 holds the driver."""

    name: str
    job: str
    run: int
    index: int
    phase: str
    owner: str = ""
    """Uid of the Job, or name of the RayCluster, that made it."""
    created: str = ""
    """RFC 3339."""
    ip: str | None = None
    node: str | None = None
    grace_over: datetime | None = None
    """When a pod that is being deleted has had its grace period; None for any other."""
    forced: bool = False
    """Was to go at once, by somebody's wish, while its containers ran."""
    gone: bool = False
    """Deleted by now; kept for what it says of its run's end."""
    ready: bool = True
    """As its node says, or as is said of a node that says nothing any more."""
    ready_since: str = ""
    """RFC 3339; empty where it isn't ready."""
    reason: str | None = None
    """The pod's own: `Evicted`, `NodeLost`, …"""
    message: str = ""
    unschedulable: str | None = None
    """What the scheduler misses."""
    disruption: str | None = None
    """Reason of the `DisruptionTarget` condition."""
    waiting: tuple[str, str] | None = None
    """Reason and message of a container that can't start."""
    terminated: str | None = None
    """Reason of the trainer's end: `OOMKilled`, `Error`, …"""
    exit_code: int | None = None
    termination_message: str = ""
    checkpoint: str = ""
    """The checkpoint that its annotations tell of (`checkpoint_marks`)."""
    failed_container: str = ""
    """Another container, which failed while the trainer has not ended: then the three above are its own."""

    @property
    def runs(self) -> bool:
        """Whether nothing is known of an end."""
        return self.phase == "Running" and not self.gone and self.grace_over is None and self.exit_code is None

    @property
    def over(self) -> bool:
        """Whether it has ended or is gone."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    @property
    def ended(self) -> bool:
        """Whether it has run, and runs no more: its trainer has ended, or the pod is over."""
        return self.exit_code is not None or (self.over and self.phase != "Pending")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run: an attempt (1, 2, …), the preflight or the clean-up (`names.PREFLIGHT_RUN`, `CLEANUP_RUN`)."""

    name: str
    job: str
    owner: str
    """Uid of the FineTuneJob that owns it."""
    run: int
    state: RunState
    created: datetime
    engine: str = "job"
    pods_owner: str = ""
    """What its pods have as their `owner`: any other pod with its labels is somebody else's."""
    pods_maker: str = ""
    """Name of the object whose events say why pods are not made, where it isn't the run's own."""
    ends_with_driver: bool = False
    """Whether the run is over once its driver's pod is, although its engine would go on without it."""
    orphaned: bool = False
    """Whether its driver's pod has ended and its engine has not noticed."""
    elsewhere: str = ""
    """The controller that runs it, where that is not this cluster's own: MultiKueue sends it to another cluster."""
    uid: str = ""
    version: int = field(default=0, compare=False)
    """Of the object, as a number: the larger one is the newer."""
    ended: datetime | None = None
    deleting: bool = False
    reason: str = ""
    """The engine's own, of a failure."""
    message: str = ""
    exit_code: int | None = None
    """As the engine knows it, where no pod is left to ask."""
    checkpoint: str = ""
    """As of `PodView`."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine says of a run's end, or of what holds it: exit codes are found in the message."""

    reason: str = ""
    message: str = ""
    ended: str | None = None


@dataclass(frozen=True)
class JobView:
    """A FineTuneJob as the API server has it. Kept as packed text: thousands of parsed specs would fill the memory."""

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
    """A warning of Kubernetes about a run that does not begin: an event's reason and message."""

    reason: str
    message: str


@dataclass(frozen=True)
class Trouble:
    """The API server did not take a run's objects: for good (`REJECTED`), or until `again` at least."""

    reason: Reason
    message: str
    again: datetime


@dataclass(frozen=True)
class Observed:
    """All that a decision is made from."""

    body: Json
    runs: tuple[RunView, ...] = ()
    pods: tuple[PodView, ...] = ()
    report: AttemptReport | None = None
    """What the current run last said of itself."""
    engine_missing: bool = False
    """The job wants an engine that the cluster doesn't have."""
    trouble: Trouble | None = None
    """Why the API server did not take the run's objects when they were last applied."""
    complaints: tuple[Complaint, ...] = ()
    """About the run that is to begin, newest first; asked for where nothing else says what holds it up."""

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    def run(self, number: int) -> RunView | None:
        return next((run for run in self.runs if run.run == number and run.owner == self.uid), None)

    def pods_of(self, number: int) -> tuple[PodView, ...]:
        """The pods that a run of this job has made, by index; of those with one index the newest first."""
        run = self.run(number)
        owned = (pod for pod in self.pods if run is not None and pod.run == number and pod.owner == run.pods_owner)
        newest = sorted(owned, key=lambda pod: (pod.created, pod.name), reverse=True)
        return tuple(sorted(newest, key=lambda pod: pod.index))


def job_view(body: Json) -> JobView:
    """A FineTuneJob without what nobody reads."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    slim = {"metadata": metadata, "spec": body.get("spec", {}), "status": body.get("status", {})}
    packed = zlib.compress(json.dumps(slim, separators=(",", ":")).encode(), level=1)
    return JobView(metadata["namespace"], metadata["name"], metadata["uid"], int(metadata["resourceVersion"]), packed)


def pod_view(body: Json) -> PodView | None:
    """A pod of ours; None for any other."""
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
        index=_index(metadata),
        phase=status.get("phase", "Pending"),
        owner=_maker(metadata),
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


def run_view(body: Json, engine: str, state: RunState, told: Told, **of_engine: Any) -> RunView | None:
    """Return an engine's object as a run, or None for one that is not the operator's.

    Args:
        of_engine: fields of `RunView` that only the engine knows.
    """
    metadata = body["metadata"]
    run, job = run_of(metadata), (metadata.get("labels") or {}).get(JOB_LABEL)
    if run is None or job is None:
        return None
    over = state in (RunState.SUCCEEDED, RunState.FAILED)
    code = _EXIT_CODE.search(told.message)
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
        ended=moment(told.ended) if over and told.ended else None,
        deleting="deletionTimestamp" in metadata,
        reason=told.reason,
        message=told.message,
        exit_code=_shell_code(int(code[1])) if code else None,
        checkpoint=mark_of(metadata.get("annotations") or {}),
        **of_engine,
    )


def _shell_code(code: int) -> int:
    """As a container has it: Ray tells a process that signal 9 has ended by -9, Kubernetes by 137."""
    return code if code >= 0 else 128 - code


def _index(metadata: Json) -> int:
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    if RAY_NODE_TYPE in marks:
        return 0 if marks[RAY_NODE_TYPE] == "head" else 1
    index = str(marks.get(COMPLETION_INDEX, 0))
    return int(index) if index.isdecimal() else 1


def _maker(metadata: Json) -> str:
    owners = metadata.get("ownerReferences") or []
    owner: Json = next((owner for owner in owners if owner.get("controller")), {})
    return str(owner["name"] if owner.get("kind") == "RayCluster" else owner.get("uid", ""))


def _containers(status: Json) -> list[Json]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _terminated(status: Json) -> tuple[str, Json]:
    """How the trainer's container ended, or else the first other one that failed."""
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
    """When an object was made, by the API server's clock."""
    return moment(metadata["creationTimestamp"])


def owner_uid(metadata: Json) -> str:
    """Uid of the controller that owns an object; empty where none does."""
    owners = metadata.get("ownerReferences") or []
    return next((owner["uid"] for owner in owners if owner.get("controller")), "")
