"""Condition types and reasons of a FineTuneJob's status. Conditions are the truth; `phase` is derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

Json = dict[str, Any]
Status = Literal["True", "False", "Unknown"]


class Type(StrEnum):
    """What can be said of a job."""

    VALIDATED = "Validated"
    """The spec makes sense, its pod template is allowed."""
    PLANNED = "Planned"
    """Preflight found that the job can work, or was switched off."""
    ADMITTED = "Admitted"
    """The attempt may have its machines; False while a queue holds it."""
    RUNNING = "Running"
    """The attempt's pods run."""
    SUSPENDED = "Suspended"
    """Stopped by `runPolicy.suspend`, its checkpoint kept."""
    STALLED = "Stalled"
    """Workers made no progress for `runPolicy.stallTimeout`, and training has not gone on since."""
    SUCCEEDED = "Succeeded"
    """Every stage is done."""
    FAILED = "Failed"
    """Over, and not tried again."""


class Reason(StrEnum):
    """Why a condition is as it is, and how an attempt ended."""

    VALID = "Valid"
    """The spec was checked."""
    INVALID_SPEC = "InvalidSpec"
    """The spec breaks a rule that the API server could not check."""
    POD_TEMPLATE_REFUSED = "PodTemplateRefused"
    """`resources.podTemplate` asks for what this operator doesn't hand out."""
    ENGINE_MISSING = "EngineMissing"
    """The engine that the job requests is not available in the cluster."""
    PREFLIGHT_RUNNING = "PreflightRunning"
    """Model, data and storage are being checked."""
    PREFLIGHT_PASSED = "PreflightPassed"
    """The job can work."""
    PREFLIGHT_SKIPPED = "PreflightSkipped"
    """`kubernetes.preflight` is false."""
    PREFLIGHT_FAILED = "PreflightFailed"
    """The job cannot work, or could not be checked."""
    QUEUED = "Queued"
    """A queue (Kueue) holds the attempt."""
    NOT_QUEUED = "NotQueued"
    """Nothing holds the attempt."""
    STARTING = "Starting"
    """Pods are being made."""
    NOT_STARTED = "NotStarted"
    """The engine did not start the attempt in time; the message has the engine's words."""
    UNSCHEDULABLE = "Unschedulable"
    """No node has room; the message says what is missing."""
    IMAGE_PULL = "ImagePullFailed"
    """The image can't be pulled."""
    POD_CONFIG = "PodConfigError"
    """A pod can't start: a Secret, ConfigMap or volume that it names is missing."""
    TRAINING = "Training"
    """All pods run."""
    STOPPING = "Stopping"
    """A checkpoint was asked for, the pods stop after it."""
    BACK_OFF = "BackOff"
    """The next attempt waits."""
    SUSPENDED = "Suspended"
    """Stopped by `runPolicy.suspend`."""
    RESUMED = "Resumed"
    """Goes on after a suspension."""
    STAGE_DONE = "StageSucceeded"
    """A stage is done, its result in storage; of events alone."""
    COMPLETED = "Completed"
    """Every stage is done."""
    DEADLINE = "DeadlineExceeded"
    """`runPolicy.activeDeadlineSeconds` is over."""
    OOM_KILLED = "OOMKilled"
    """The host's memory ran out."""
    DEVICE_OOM = "CUDAOutOfMemory"
    """The GPU's memory ran out."""
    SHARED_MEMORY = "SharedMemoryFull"
    """/dev/shm is full."""
    GPU_FAULT = "GPUFault"
    """A GPU is broken (ECC, NVLink, Xid); the next attempt keeps away from its node."""
    DEVICE_ASSERT = "CUDADeviceAssert"
    """A kernel found an index out of range."""
    ILLEGAL_ACCESS = "CUDAIllegalAccess"
    """A kernel used an invalid address."""
    STALLED = "Stalled"
    """Workers made no progress for too long; the next attempt prefers other nodes."""
    EVICTED = "Evicted"
    """The pod was evicted, preempted or drained."""
    NODE_LOST = "NodeLost"
    """The node went away."""
    RENDEZVOUS = "RendezvousFailed"
    """Workers could not find or lost each other (Ray, NCCL, gloo)."""
    USER_ERROR = "UserError"
    """The job, its data or its settings are wrong."""
    GATE_NOT_PASSED = "GateNotPassed"
    """An evaluation missed a bound that the job sets; the message has the metric, its value and the bound."""
    INTERRUPTED = "Interrupted"
    """Stopped from outside with a checkpoint."""
    POD_DELETED = "PodDeleted"
    """One of the run's pods was deleted while it ran, and not by the operator."""
    DELETED = "RunDeleted"
    """The main object of the run was deleted, and not by the operator."""
    REJECTED = "Rejected"
    """The API server refuses the run's objects as malformed."""
    FORBIDDEN = "Forbidden"
    """A quota, a policy or a missing right keeps the run's objects from being made; tried again."""
    REPEATED_ERROR = "RepeatedError"
    """The same error ended two attempts in a row at the same step."""
    CLEANING_UP = "CleaningUp"
    """The job is deleted, and its storage is being emptied; the message says what that waits for."""
    CLEANUP_FAILED = "CleanupFailed"
    """The job is deleted and its storage could not be emptied."""
    UNKNOWN = "TrainingFailed"
    """Anything else."""


@dataclass(frozen=True)
class Condition:
    """One condition as decided; times are added when it is compared with what stands in the status."""

    type: Type
    status: Status
    reason: Reason
    message: str = ""


def merged(old: list[Json], new: list[Condition], generation: int, now: datetime) -> list[Json]:
    """Kubernetes' condition list: a condition's `lastTransitionTime` moves when its status does, and only then."""
    before = {item.get("type"): item for item in old}
    return [_merge(before.get(condition.type.value), condition, generation, now) for condition in new]


def _merge(old: Json | None, new: Condition, generation: int, now: datetime) -> Json:
    since = old["lastTransitionTime"] if old and old.get("status") == new.status else stamp(now)
    return {
        "type": new.type.value,
        "status": new.status,
        "reason": new.reason.value,
        "message": new.message,
        "lastTransitionTime": since,
        "observedGeneration": generation,
    }


def stamp(moment: datetime) -> str:
    """RFC 3339 with whole seconds, as Kubernetes writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """The time in an RFC 3339 text, with or without fractions of a second."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
