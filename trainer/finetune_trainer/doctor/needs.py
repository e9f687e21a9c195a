"""Derives the requirements of a job on its nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.data import DataSpec
from finetune_api.job import FineTuneJob
from finetune_api.stages import Stage

_RDMA = re.compile(r"rdma|infiniband|\bhca\b|/(?:ib|roce)\b|/efa\b", re.IGNORECASE)
"""Matches extended resources of RDMA device plugins: `rdma/hca`, `nvidia.com/hostdev_rdma`, AWS' `efa`."""


@dataclass(frozen=True)
class Needs:
    """The requirements on a node. Paths are fields of the job that cause a requirement; empty if none does."""

    gpus: int
    """GPUs per node; 0 for a job on CPUs."""
    nodes: int = 1
    compiled: str = ""
    """Path of a stage whose loss is a Triton kernel on GPUs."""
    quantized: str = ""
    """Path of a quantized stage."""
    attention: str = "auto"
    dtype: str = "auto"
    vllm: str = ""
    """Path of a stage that generates with vLLM if it is installed."""
    hub: str = ""
    """Path of a model or a dataset on the Hugging Face hub."""
    rdma: bool = False
    """Whether the pod template requests an RDMA device."""
    memory: str | None = None
    """`resources.memoryPerNode`."""


def gpu_node() -> Needs:
    """Return the requirements on any GPU node: it trains a quantized model on one GPU."""
    return Needs(gpus=1, compiled="stages", quantized="stages")


def job_needs(job: FineTuneJob, gpus_here: int) -> Needs:
    """Return the requirements of a job on each of its nodes.

    Args:
        job: the job.
        gpus_here: GPUs of this machine, which a job uses if it does not set `resources.gpusPerNode`.
    """
    resources, stages = job.spec.resources, job.spec.stages
    gpus = resources.gpus_per_node if resources.gpus_per_node is not None else gpus_here
    return Needs(
        gpus=gpus,
        nodes=resources.max_nodes or resources.nodes or 1,
        compiled=_first(stages, _is_compiled),
        quantized=_first(stages, lambda stage: getattr(stage.spec, "quantization", None) is not None),
        attention=job.spec.model.attn_implementation,
        dtype=job.spec.model.dtype,
        vllm=_first(stages, lambda stage: stage.rlhf is not None and stage.rlhf.vllm == "auto"),
        hub=_hub(job),
        rdma=any(_RDMA.search(name) for name in _extended_resources(resources.pod_template)),
        memory=resources.memory_per_node,
    )


def _is_compiled(stage: Stage) -> bool:
    """Whether a stage uses TRL's language-model losses or log-probabilities, which are Triton kernels on CUDA."""
    spec = stage.spec
    return spec.trains and spec.task == "causal"


def _first(stages: list[Stage], matches: Callable[[Stage], bool]) -> str:
    return next((f"stages[{index}].{stage.kind}" for index, stage in enumerate(stages) if matches(stage)), "")


def _hub(job: FineTuneJob) -> str:
    if job.spec.model.hub is not None:
        return "model.hub"
    return _first(job.spec.stages, lambda stage: any(source.hub for data in _data(stage) for source in data.sources))


def _data(stage: Stage) -> Iterator[DataSpec]:
    values = (getattr(stage.spec, name) for name in type(stage.spec).model_fields)
    return (value for value in values if isinstance(value, DataSpec))


def _extended_resources(template: dict[str, Any] | None) -> Iterator[str]:
    """Yield the names of the limits of a pod template's containers. Values of wrong types are ignored."""
    spec = (template or {}).get("spec")
    containers = spec.get("containers") if isinstance(spec, dict) else None
    for container in containers if isinstance(containers, list) else []:
        resources = container.get("resources") if isinstance(container, dict) else None
        limits = resources.get("limits") if isinstance(resources, dict) else None
        yield from map(str, limits if isinstance(limits, dict) else {})
