"""Resources, sharding, storage and run policy of a job."""

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
    """Convert null to 0: the JSON of a job omits nulls, but here null differs from an unset field."""
    if value is None:
        return 0
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LONGEST_SECONDS
    if whole or value == AUTO:
        return value
    raise PydanticCustomError("timeout", "expected `auto`, or a number of seconds (0 or more)")


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
            **expects(f"`{AUTO}`, or a number of seconds (0 or more)"),
        }
    ),
]
"""Seconds (an int) or `auto`. 0 and null disable the timeout."""


class Resources(ApiModel):
    """Number of nodes and the resources of each. A node is one pod; each GPU has one Ray Train worker."""

    model_config = rules(
        cel(
            "has(self.minNodes) == has(self.maxNodes) && (!has(self.minNodes) || self.minNodes <= self.maxNodes)",
            "set both minNodes and maxNodes, with minNodes <= maxNodes",
        ),
        cel("!has(self.nodes) || !has(self.minNodes)", "set either nodes, or minNodes and maxNodes"),
        cel(
            "!has(self.workersPerNode) || !has(self.gpusPerNode) || self.gpusPerNode == 0",
            "workersPerNode applies to nodes without GPUs: a node with GPUs has one worker per GPU",
        ),
    )

    nodes: NodeCount | None = None
    """Number of nodes. Default: 1, unless `minNodes` and `maxNodes` are set."""
    min_nodes: NodeCount | None = None
    """Minimum number of nodes of an elastic job. It starts as soon as this many nodes are available."""
    max_nodes: NodeCount | None = None
    """Maximum number of nodes of an elastic job."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs per node. Default: all GPUs of the machine for `finetune run`; none on a cluster."""
    workers_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    """Ray Train workers per node without GPUs. Default: 1."""
    cpus_per_node: Quantity | None = None
    """CPUs per node, such as `8`. Default: all CPUs of the machine for `finetune run`; no request on a cluster."""
    memory_per_node: Quantity | None = None
    """Host memory per node, such as `64Gi`; request and limit of the pod. Default: all memory of the machine for
    `finetune run`; on a cluster, a pod with GPUs requests the amount that preflight estimates and has no limit."""
    pod_template: dict[str, Any] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """`PodTemplateSpec` that is the base of the job's pods: node selectors, tolerations, volumes, environment."""

    def faults(self) -> Iterator[str]:
        if (self.min_nodes is None) != (self.max_nodes is None) or (self.min_nodes or 1) > (self.max_nodes or 1):
            yield "set both minNodes and maxNodes, with minNodes <= maxNodes"
        if self.nodes is not None and self.min_nodes is not None:
            yield "set either nodes, or minNodes and maxNodes"
        if self.workers_per_node is not None and self.gpus_per_node:
            yield "workersPerNode applies to nodes without GPUs: a node with GPUs has one worker per GPU"


class Sharding(ApiModel):
    """Sharding of weights, gradients and optimizer states across the workers (DeepSpeed ZeRO)."""

    zero: Literal["auto", 0, 1, 2, 3] = Field(default="auto", json_schema_extra={"x-kubernetes-int-or-string": True})
    """ZeRO stage. 0: each worker holds everything. 1: optimizer states are sharded. 2: gradients too. 3: weights too.
    `auto`: the smallest stage that fits according to the memory estimate."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory. Needs `zero` 1, 2 or 3."""
    offload_param: bool = False
    """Keep weights in host memory. Needs `zero: 3`."""

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
    """Storage of checkpoints and results: a directory with the name of the job, below `path` or `uri`."""

    model_config = rules(exactly_one(*STORAGE_KINDS))

    path: Path | None = None
    """Directory. A relative path starts at the current directory of `finetune run`."""
    uri: Uri | None = None
    """Storage URI, such as `s3://bucket/runs`, or `pvc://claim/path` on a cluster. On a cluster the job's directory is
    `<uri>/<namespace>/<name>`."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What happens to the job's directory when the job is deleted from a cluster. `Delete`: a pod deletes its content
    first."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *STORAGE_KINDS)


class RunPolicy(ApiModel):
    """Time limits, retries and failure handling of a job, with the field names of a Kubernetes Job."""

    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    """Number of retries, each from the last checkpoint, before the job fails. Only failures that are not the user's
    fault are retried. Training progress resets the count."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Seconds after which a running job is stopped. Its last checkpoint is kept. Default: no limit."""
    ddp_timeout: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1800
    """Timeout of a collective operation (NCCL, gloo) in seconds: `ddp_timeout` of transformers. The time in which
    workers load data and weights does not count."""
    loading_timeout_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 7200
    """Seconds that workers wait for each other while they load data and weights. The error after this timeout names the
    missing workers and their nodes."""
    suspend: bool = False
    """Whether the job is suspended. true: save a checkpoint and stop the pods. false: continue from that checkpoint."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds after its end until a job is deleted. Its results are kept. Default: never."""
    on_bad_loss: Literal["fail", "skip", "rollback"] = "fail"
    """What to do about a bad training step: its loss or gradient norm is NaN or infinite, or far above those of the
    preceding steps. The log names the rows of the step. `fail`: end the job; if the values are finite, only after 5 bad
    steps in a row. `skip`: skip the optimizer update of the step on all workers. `rollback`: return to the last
    checkpoint and skip the update of the step when it is reached again. `skip` and `rollback` end the job if bad steps
    continue."""
    stall_timeout: Timeout = AUTO
    """Seconds without progress (a step, a part of a save, an evaluation, loading or a download) after which the workers
    are considered stalled. Their stack traces are written to the log and to storage, and they restart from the last
    checkpoint. `auto`: 30 times the median step time of the job, at least 600 s. null or 0: disabled."""
