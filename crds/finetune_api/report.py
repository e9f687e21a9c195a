"""What a running attempt says of itself to the operator: at its HTTP port while it runs, in its termination message
when it ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel

Text = Annotated[str, Field(max_length=4096)]
Metrics = Annotated[dict[Annotated[str, Field(max_length=128)], float], Field(max_length=64)]

PORT = 8469
"""Where the driver's pod serves its report."""
NODE_VARIABLE = "FINETUNE_NODE_NAME"
"""Environment variable of each pod that holds the name of its node."""
REPORT_PATH = "/v1/report"
STOP_PATH = "/v1/stop"
TERMINATION_MESSAGE_BYTES = 4096
"""Kubelet keeps no more of a container's termination message."""


class StageReport(ApiModel):
    """How one stage stands."""

    name: Annotated[str, Field(max_length=64)]
    """Name of the stage."""
    state: Literal["Pending", "Running", "Succeeded"]
    """Whether it waits, runs or is done."""
    start_time: Annotated[str, Field(max_length=32)] | None = None
    """When it began, RFC 3339, UTC."""
    completion_time: Annotated[str, Field(max_length=32)] | None = None
    """When it was done."""
    metrics: Metrics = Field(default={})
    """Its last metrics."""
    result: Text | None = None
    """Where its result is."""


class StepReport(ApiModel):
    """The newest step."""

    step: int
    """Optimizer steps done in the stage."""
    total: int
    """Optimizer steps in all."""
    loss: float | None = None
    """Training loss."""
    learning_rate: float | None = None
    """Learning rate."""
    tokens_per_second: float | None = None
    """Tokens per second, all workers together."""
    samples_per_second: float | None = None
    """Rows per second, all workers together."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1."""
    eta_seconds: float | None = None
    """Seconds to the stage's end."""
    step_seconds_median: float | None = None
    """Seconds of a worker's own part of a step: the median of all workers. None with one worker."""
    step_seconds_max: float | None = None
    """The slowest worker's."""
    slow_node: Annotated[str, Field(max_length=253)] | None = None
    """Name of a node whose workers are much slower than the others'."""
    slow_factor: float | None = None
    """How many times as long they take."""


class CheckpointReport(ApiModel):
    """The newest complete checkpoint."""

    stage: int
    """Index of its stage, from 0."""
    step: int
    """Optimizer steps done when it was saved."""
    uri: Text
    """Where it is."""
    saved_at: Annotated[str, Field(max_length=32)] | None = None
    """When it was complete, RFC 3339, UTC."""


class PlanReport(ApiModel):
    """What preflight found a job to need."""

    parameters: int
    """Weights of the model."""
    memory_bytes: int | None = None
    """Peak memory per worker, as estimated."""
    host_bytes: int | None = None
    """Peak host memory of a node, as estimated. Of a job on CPUs, what comes on top of its workers' memory."""
    zero: int | None = None
    """The largest ZeRO stage that a stage of the job uses."""
    steps: int | None = None
    """Optimizer steps of all stages, where the data's size is known."""
    checkpoint_bytes: int | None = None
    """Size of the largest checkpoint."""
    save_seconds: int | None = None
    """Seconds that saving it takes, by the measured speed of the job's storage."""
    warnings: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=8)] = Field(default=[])
    """What the job can work with, and should be changed."""


class TransportReport(ApiModel):
    """How the GPUs of a job of several nodes reach each other, by NCCL's log."""

    network: Annotated[str, Field(max_length=64)]
    """NCCL's name of the network between nodes: `IB` (InfiniBand and RoCE), `Socket` (TCP), or a plugin's."""
    gpu_direct: bool = False
    """Whether adapters read GPU memory themselves (GPUDirect RDMA)."""
    words: Annotated[str, Field(max_length=256)]
    """The same for people, with the transports within a node."""
    warning: Annotated[str, Field(max_length=1024)] | None = None
    """What makes it slow, and the remedy."""


class AttemptReport(ApiModel):
    """All that an attempt tells. Later reports replace earlier ones."""

    stages: Annotated[list[StageReport], Field(max_length=32)] = Field(default=[])
    """Every stage of the job, in order."""
    current: int | None = None
    """Index of the stage that runs."""
    step: StepReport | None = None
    """Newest step of that stage."""
    checkpoint: CheckpointReport | None = None
    """Newest complete checkpoint."""
    stopping: bool = False
    """Asked to stop, and saving a checkpoint."""
    waiting: Text | None = None
    """What it waits for: a store that doesn't answer."""
    placing: Text | None = None
    """What its workers ask for and Ray's nodes don't offer, while a placement group is pending."""
    restarting: Text | None = None
    """Why its workers have been started again, until they train on."""
    transport: TransportReport | None = None
    """How the GPUs of several nodes reach each other."""
    stalled: Text | None = None
    """That its workers make no progress, and which one is behind, until they train on."""
    plan: PlanReport | None = None
    """Preflight's plan."""
    exit_code: int | None = None
    """How the attempt ended, by `finetune_api.exit_codes`."""
    message: Text | None = None
    """Why it ended: the faults of a bad job, or the last lines of a traceback, secrets removed."""
    node: Annotated[str, Field(max_length=253)] | None = None
    """Name of the node on which a GPU fault ended it, or whose worker is behind the others in a stall."""
