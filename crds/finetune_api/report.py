"""Report of an attempt to the operator, on an HTTP port while it runs and in the termination message when it ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel

Text = Annotated[str, Field(max_length=4096)]
Metrics = Annotated[dict[Annotated[str, Field(max_length=128)], float], Field(max_length=64)]

PORT = 8469
"""Port on which the pod of the driver serves its report."""
NODE_VARIABLE = "FINETUNE_NODE_NAME"
"""Environment variable of each pod with the name of its node."""
REPORT_PATH = "/v1/report"
STOP_PATH = "/v1/stop"
TERMINATION_MESSAGE_BYTES = 4096
"""Maximum length of a termination message that the kubelet keeps."""


class StageReport(ApiModel):
    """State of one stage."""

    name: Annotated[str, Field(max_length=64)]
    """Name of the stage."""
    state: Literal["Pending", "Running", "Succeeded"]
    """State of the stage."""
    start_time: Annotated[str, Field(max_length=32)] | None = None
    """Start time, RFC 3339, UTC."""
    completion_time: Annotated[str, Field(max_length=32)] | None = None
    """End time, RFC 3339, UTC."""
    metrics: Metrics = Field(default={})
    """The most recent metrics."""
    result: Text | None = None
    """Path or URI of the result."""


class StepReport(ApiModel):
    """The most recent step."""

    step: int
    """Completed optimizer steps of the stage."""
    total: int
    """Total number of optimizer steps of the stage."""
    loss: float | None = None
    """Training loss."""
    learning_rate: float | None = None
    """Learning rate."""
    tokens_per_second: float | None = None
    """Tokens per second of all workers together."""
    samples_per_second: float | None = None
    """Rows per second of all workers together."""
    mfu: float | None = None
    """Model FLOPs utilization, 0 to 1."""
    eta_seconds: float | None = None
    """Estimated seconds until the end of the stage."""
    step_seconds_median: float | None = None
    """Step time in seconds without waiting for other workers, the median of all workers. None with one worker."""
    step_seconds_max: float | None = None
    """Step time in seconds of the slowest worker."""
    slow_node: Annotated[str, Field(max_length=253)] | None = None
    """Name of a node whose workers are much slower than the others."""
    slow_factor: float | None = None
    """Step time of these workers relative to the others."""


class CheckpointReport(ApiModel):
    """The most recent complete checkpoint."""

    stage: int
    """Index of its stage, from 0."""
    step: int
    """Completed optimizer steps when it was saved."""
    uri: Text
    """Path or URI of the checkpoint."""
    saved_at: Annotated[str, Field(max_length=32)] | None = None
    """Time when it was complete, RFC 3339, UTC."""


class PlanReport(ApiModel):
    """Requirements of a job that preflight estimates."""

    parameters: int
    """Number of parameters of the model."""
    memory_bytes: int | None = None
    """Estimated peak device memory per worker in bytes."""
    host_bytes: int | None = None
    """Estimated peak host memory of a node in bytes. For jobs on CPUs, without the memory of the workers."""
    zero: int | None = None
    """The highest ZeRO stage that a stage of the job uses."""
    steps: int | None = None
    """Optimizer steps of all stages, if the size of the data is known."""
    checkpoint_bytes: int | None = None
    """Size of the largest checkpoint in bytes."""
    save_seconds: int | None = None
    """Estimated seconds to save it, from the measured write speed of the storage."""
    warnings: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=8)] = Field(default=[])
    """Settings that work but should be changed."""


class TransportReport(ApiModel):
    """Transport between the GPUs of several nodes, from the log of NCCL."""

    network: Annotated[str, Field(max_length=64)]
    """Network between nodes in NCCL's terms: `IB` (InfiniBand and RoCE), `Socket` (TCP), or the name of a plugin."""
    gpu_direct: bool = False
    """Whether network adapters access GPU memory directly (GPUDirect RDMA)."""
    words: Annotated[str, Field(max_length=256)]
    """Readable description, including the transports within a node."""
    warning: Annotated[str, Field(max_length=1024)] | None = None
    """Why the transport is slow, and the remedy."""


class AttemptReport(ApiModel):
    """Report of an attempt. A later report replaces an earlier one."""

    stages: Annotated[list[StageReport], Field(max_length=32)] = Field(default=[])
    """All stages of the job, in order."""
    current: int | None = None
    """Index of the running stage."""
    step: StepReport | None = None
    """Most recent step of the running stage."""
    checkpoint: CheckpointReport | None = None
    """Most recent complete checkpoint."""
    stopping: bool = False
    """Whether a stop was requested and a checkpoint is being saved."""
    waiting: Text | None = None
    """Which unavailable store the attempt waits for."""
    placing: Text | None = None
    """Resources that the workers request and the Ray nodes lack, while a placement group is pending."""
    restarting: Text | None = None
    """Why the workers were restarted. Unset as soon as training continues."""
    transport: TransportReport | None = None
    """Transport between the GPUs of several nodes."""
    stalled: Text | None = None
    """Message about workers that make no progress, and which one is behind. Unset as soon as training continues."""
    plan: PlanReport | None = None
    """Requirements that preflight estimated."""
    exit_code: int | None = None
    """Exit code of the attempt (`finetune_api.exit_codes`)."""
    message: Text | None = None
    """Why it ended: the problems of an invalid job, or the last lines of a traceback, without secrets."""
    node: Annotated[str, Field(max_length=253)] | None = None
    """Name of the node with the GPU fault that ended it, or of the node whose worker is behind in a stall."""
