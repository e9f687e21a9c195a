"""Condition types and reasons of a FineTuneJob's status. Conditions are the truth; `phase` is derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

Json = dict[str, Any]
Status = Literal["True", "False", "Unknown"]


class Type(StrEnum):
    """Condition types of a FineTuneJob."""

    VALIDATED = "Validated"
    """The spec is valid and its pod template is allowed."""
    PLANNED = "Planned"
    """Preflight found that the job can run, or is switched off."""
    ADMITTED = "Admitted"
    """No queue holds the attempt; False while one does."""
    RUNNING = "Running"
    """The attempt's pods run."""
    SUSPENDED = "Suspended"
    """Stopped by `runPolicy.suspend`; its checkpoint is kept."""
    STALLED = "Stalled"
    """Workers made no progress for `runPolicy.stallTimeout`, and training has not continued since."""
    SUCCEEDED = "Succeeded"
    """Every stage is done."""
    FAILED = "Failed"
    """The job has failed and is not retried."""


class Reason(StrEnum):
    """Reasons of conditions and of the ends of attempts."""

    VALID = "Valid"
    """The spec is valid."""
    INVALID_SPEC = "InvalidSpec"
    """The spec breaks a rule that the API server cannot check."""
    POD_TEMPLATE_REFUSED = "PodTemplateRefused"
    """`resources.podTemplate` sets a field or value that this operator does not allow."""
    ENGINE_MISSING = "EngineMissing"
    """The engine that the job requests is not available in the cluster."""
    PREFLIGHT_RUNNING = "PreflightRunning"
    """Model, data and storage are being checked."""
    PREFLIGHT_PASSED = "PreflightPassed"
    """Preflight found that the job can run."""
    PREFLIGHT_SKIPPED = "PreflightSkipped"
    """`kubernetes.preflight` is false."""
    PREFLIGHT_FAILED = "PreflightFailed"
    """Preflight found that the job cannot run, or could not check it."""
    QUEUED = "Queued"
    """A queue (Kueue) holds the attempt."""
    NOT_QUEUED = "NotQueued"
    """No queue holds the attempt."""
    STARTING = "Starting"
    """The attempt's pods are created or starting."""
    NOT_STARTED = "NotStarted"
    """The engine did not start the attempt in time; the message has the engine's state."""
    UNSCHEDULABLE = "Unschedulable"
    """No node fits the pods; the message is the scheduler's."""
    IMAGE_PULL = "ImagePullFailed"
    """The image cannot be pulled."""
    POD_CONFIG = "PodConfigError"
    """A pod cannot start: a Secret, ConfigMap or volume that it names is missing."""
    TRAINING = "Training"
    """All pods run."""
    STOPPING = "Stopping"
    """The attempt saves a checkpoint, then its pods stop."""
    BACK_OFF = "BackOff"
    """The next attempt waits for its backoff delay."""
    SUSPENDED = "Suspended"
    """Stopped by `runPolicy.suspend`."""
    RESUMED = "Resumed"
    """Continued after a suspension."""
    STAGE_DONE = "StageSucceeded"
    """A stage is done and its result is in storage; used by events only."""
    COMPLETED = "Completed"
    """Every stage is done."""
    DEADLINE = "DeadlineExceeded"
    """The job ran longer than `runPolicy.activeDeadlineSeconds`."""
    OOM_KILLED = "OOMKilled"
    """A container exceeded its memory limit, or the host ran out of memory."""
    DEVICE_OOM = "CUDAOutOfMemory"
    """A GPU ran out of memory."""
    SHARED_MEMORY = "SharedMemoryFull"
    """/dev/shm is full."""
    GPU_FAULT = "GPUFault"
    """A GPU is faulty (ECC, NVLink, Xid); the next attempt avoids its node."""
    DEVICE_ASSERT = "CUDADeviceAssert"
    """A device-side assertion failed, for example an index out of range."""
    ILLEGAL_ACCESS = "CUDAIllegalAccess"
    """A kernel accessed an invalid address."""
    STALLED = "Stalled"
    """Workers made no progress for `runPolicy.stallTimeout`; the next attempt prefers other nodes."""
    EVICTED = "Evicted"
    """The pod was evicted, preempted or drained."""
    NODE_LOST = "NodeLost"
    """The node is lost."""
    RENDEZVOUS = "RendezvousFailed"
    """Workers could not connect to each other or lost the connection (Ray, NCCL, gloo)."""
    USER_ERROR = "UserError"
    """The job, its data or its settings are wrong."""
    GATE_NOT_PASSED = "GateNotPassed"
    """An evaluation metric missed its gate; the message has the metric, its value and the bound."""
    INTERRUPTED = "Interrupted"
    """Stopped by a signal, after saving a checkpoint."""
    POD_DELETED = "PodDeleted"
    """A running pod of the run was deleted, and not by the operator."""
    DELETED = "RunDeleted"
    """The main object of the run was deleted, and not by the operator."""
    REJECTED = "Rejected"
    """The API server refuses the run's objects as malformed."""
    FORBIDDEN = "Forbidden"
    """A quota, a policy or missing RBAC rights prevent the creation of the run's objects; retried."""
    REPEATED_ERROR = "RepeatedError"
    """The same error ended two attempts in a row at the same step."""
    CLEANING_UP = "CleaningUp"
    """The job is deleted and its storage is being emptied; the message says what this waits for."""
    CLEANUP_FAILED = "CleanupFailed"
    """The job is deleted, and emptying its storage failed."""
    UNKNOWN = "TrainingFailed"
    """Any other failure."""


@dataclass(frozen=True)
class Condition:
    """A condition as decided; `merged` adds its times from the previous status."""

    type: Type
    status: Status
    reason: Reason
    message: str = ""


def merged(old: list[Json], new: list[Condition], generation: int, now: datetime) -> list[Json]:
    """Return the condition list of a status: `lastTransitionTime` changes only when a condition's status changes."""
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
    """Return the time in RFC 3339 with whole seconds, as Kubernetes writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """Parse an RFC 3339 time, with or without fractions of a second."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
