"""What a job runs on: machines, sharding, storage and the policy of its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from finetune_api.base import ApiModel, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.model import Path, Uri

Quantity = Annotated[
    str,
    Field(
        max_length=32,
        pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        json_schema_extra=expects("a quantity such as `8`, `500m` or `64Gi`"),
    ),
]
NodeCount = Annotated[int, Field(ge=1, le=4096)]
AUTO = "auto"
LONGEST_SECONDS = 2**31 - 1


def _timeout(value: object) -> object:
    """Read null as 0: JSON of a job leaves null out, and this field tells null from what is not set."""
    if value is None:
        return 0
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LONGEST_SECONDS
    if whole or value == AUTO:
        return value
    raise PydanticCustomError("timeout", "expected `auto`, or seconds from 0 on")


Timeout = Annotated[
    Any,
    BeforeValidator(_timeout),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "nullable": True,
            "minimum": 0,
            "maximum": LONGEST_SECONDS,
            "pattern": f"^{AUTO}$",
            **expects(f"`{AUTO}`, or seconds from 0 on"),
        }
    ),
]
"""Seconds, an int, or `auto`. 0 and null switch it off."""


class Resources(ApiModel):
    """Nodes and what each offers. A node is one pod; each of its GPUs is one Ray Train worker."""

    model_config = rules(
        cel(
            "has(self.minNodes) == has(self.maxNodes) && (!has(self.minNodes) || self.minNodes <= self.maxNodes)",
            "minNodes and maxNodes go together, and minNodes <= maxNodes",
        ),
        cel("!has(self.nodes) || !has(self.minNodes)", "set nodes, or minNodes and maxNodes"),
        cel(
            "!has(self.workersPerNode) || !has(self.gpusPerNode) || self.gpusPerNode == 0",
            "workersPerNode is for CPU nodes: with GPUs there is one worker per GPU",
        ),
    )

    nodes: NodeCount | None = None
    """Number of nodes. Default: 1, where `minNodes` and `maxNodes` are not set."""
    min_nodes: NodeCount | None = None
    """Fewest nodes an elastic job starts with."""
    max_nodes: NodeCount | None = None
    """Most nodes an elastic job uses."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs per node. Default: on one machine every GPU it has; on a cluster none."""
    workers_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Ray Train workers per node without GPUs. Default: 1."""
    cpus_per_node: Quantity | None = None
    """CPUs per node, such as `8`. Default: on one machine all it has."""
    memory_per_node: Quantity | None = None
    """Host memory per node, such as `64Gi`, as request and limit. Default: on one machine all it has; on a cluster a
    pod with GPUs requests what the preflight plans, without a limit."""
    pod_template: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """A `PodTemplateSpec` that the job's pods start from: node selectors, tolerations, volumes, environment."""

    def faults(self) -> Iterator[str]:
        if (self.min_nodes is None) != (self.max_nodes is None) or (self.min_nodes or 1) > (self.max_nodes or 1):
            yield "minNodes and maxNodes go together, and minNodes <= maxNodes"
        if self.nodes is not None and self.min_nodes is not None:
            yield "set nodes, or minNodes and maxNodes"
        if self.workers_per_node is not None and self.gpus_per_node:
            yield "workersPerNode is for CPU nodes: with GPUs there is one worker per GPU"


class Sharding(ApiModel):
    """How weights, gradients and optimizer states are divided among the workers (DeepSpeed's ZeRO)."""

    zero: Literal["auto", 0, 1, 2, 3] = Field(default="auto", json_schema_extra={"x-kubernetes-int-or-string": True})
    """ZeRO stage: 0 keeps all on each worker, 1 divides optimizer states, 2 also gradients, 3 also weights.
    `auto`: the least that fits, by the memory estimate."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory. Needs `zero` 1 to 3."""
    offload_param: bool = False
    """Keep weights in the host's memory. Needs `zero: 3`."""

    model_config = rules(
        cel(
            "!self.offloadOptimizer || type(self.zero) == string || self.zero != 0",
            "offloadOptimizer needs zero 1, 2 or 3",
        ),
        cel("!self.offloadParam || (type(self.zero) == int && self.zero == 3)", "offloadParam needs zero: 3"),
    )

    def faults(self) -> Iterator[str]:
        if self.offload_optimizer and self.zero == 0:
            yield "offloadOptimizer needs zero 1, 2 or 3"
        if self.offload_param and self.zero != 3:
            yield "offloadParam needs zero: 3"


STORAGE_KINDS = ("path", "uri")


class Storage(ApiModel):
    """Where checkpoints and results go: a directory named after the job, below `path` or `uri`."""

    model_config = rules(exactly_one(*STORAGE_KINDS))

    path: Path | None = None
    """Directory; a relative one starts where the command runs."""
    uri: Uri | None = None
    """Storage URI, such as `s3://bucket/runs`, or `pvc://claim/path` on a cluster, where a directory named after the
    namespace lies between it and the job's own."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What becomes of the job's directory when the job is deleted on a cluster. `Delete`: a pod empties it first."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *STORAGE_KINDS)


class RunPolicy(ApiModel):
    """How long a job may run and what happens when it fails, in the terms of a Kubernetes Job."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """How often a run that failed for no fault of the user's is started again from its last checkpoint, before it
    counts as failed. Progress sets the count back."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Seconds after which a running job is stopped, its last checkpoint kept. Default: none."""
    ddp_timeout: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1800
    """Seconds after which a collective operation that does not end fails (NCCL, gloo): transformers' `ddp_timeout`. The
    time in which workers load data and weights does not count."""
    loading_timeout_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 7200
    """Seconds that workers wait for each other while data and weights are fetched and loaded. The error then names the
    workers that are missing, and their nodes."""
    suspend: bool = False
    """Save a checkpoint and stop; false goes on from it."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds after which a finished job is deleted; its results stay. Default: never."""
    on_bad_loss: Literal["fail", "skip", "rollback"] = "fail"
    """What to do when a training step shows bad numbers: a loss or gradient norm that is NaN or infinite, a loss far
    above, or a gradient norm far above, those of the last steps. The log has the numbers of the step's rows. `fail`
    ends the job; of finite numbers only where they stay bad for 5 steps. `skip` drops the step's update on all workers.
    `rollback` goes back to the last checkpoint and drops the step's update there. `skip` and `rollback` end the job
    too where that doesn't help."""
    stall_timeout: Timeout = AUTO
    """Seconds without any progress (a step, a part of a save, of an evaluation, of loading or of a download) after
    which the workers count as stalled: their stacks go to the log and to storage, and they start again from the last
    checkpoint. `auto`: 30 times the job's own median step, at least 600 s. null or 0: never."""
