"""Host memory of the node that needs most: the first worker's, which saves and merges."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from transformers import PretrainedConfig, PreTrainedModel

from finetune_api.runconfig import RunConfig
from finetune_api.stages import TrainedSpec
from finetune_trainer.errors import Outage, UserError
from finetune_trainer.model.base_files import open_base
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.lora import find_targets
from finetune_trainer.model.prequantized import quantization_method
from finetune_trainer.model.saved_model import root_of
from finetune_trainer.model.source import base_source
from finetune_trainer.model.task import auto_class
from finetune_trainer.model.weights import is_local
from finetune_trainer.plan.memory import Memory, Workload
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.plan.states import MASTER, trainable
from finetune_trainer.storage.filesystem import Storage

SHARD = 5_000_000_000
"""Bytes of one file of a result (`model.weights.SHARD_SIZE`)."""
PROCESS = 3 << 30
"""Of a worker on a GPU: torch, transformers, PEFT, DeepSpeed and CUDA's libraries. An allowance, not a measurement."""
DRIVER = 2 << 30
"""Of a node: Ray, its object store and the job's driver. An allowance, not a measurement."""
DATA_WORKER = 300 << 20
"""Of a process that loads data. An allowance, not a measurement."""


@dataclass(frozen=True)
class HostWork:
    """What the host's memory depends on besides the device's workload."""

    workers: int = 1
    """On a node."""
    data_workers: int = 0
    """Processes that load data, for each worker."""
    saved_bytes: int = 2
    """Bytes of a weight in the base's files."""
    merges: bool = False
    """Whether the result is the base with an adapter, or with trained experts, merged in."""
    by_tensor: bool = True
    """Whether the merge goes through the base's files; else it holds the base in float32."""
    dequantizes: bool = False
    """Whether a plain copy of quantized weights is made first, as a whole."""
    composite: bool = False
    largest: int = 0
    """Elements of the largest weight."""
    largest_merged: int = 0
    """Elements of the largest weight that an adapter changes."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node's host memory by part. Loading, saving and merging are not at the same time.

    A worker on a CPU has its weights and all else of `Memory` in the host's memory too; that is not repeated here.
    """

    processes: int
    data: int
    """Processes that load data."""
    offloaded: int
    """Optimizer states and weights that DeepSpeed keeps on the host, pinned on GPU nodes."""
    loading: int
    saving: int
    merging: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.processes + self.data + self.offloaded + max(self.loading, self.saving, self.merging)

    def parts(self) -> dict[str, int]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        named = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.parts().items() if size)
        return f"{human_bytes(self.total)} ({named})"


def host_estimate(size: ModelSize, load: Workload, memory: Memory, work: HostWork) -> HostMemory:
    """Return the host memory of the first worker's node."""
    on_gpus = load.kind == "cuda"
    return HostMemory(
        processes=work.workers * PROCESS + DRIVER if on_gpus else 0,
        data=work.workers * work.data_workers * DATA_WORKER,
        offloaded=work.workers * memory.host,
        loading=_loading(size, load, work),
        saving=_saving(size, load, work),
        merging=_merging(size, load, work) if work.merges else 0,
    )


def host_work(
    run: RunConfig, spec: TrainedSpec, config: PretrainedConfig, model: PreTrainedModel, workers: int, dtype_bytes: int
) -> HostWork:
    """Return what a stage's host memory depends on.

    Args:
        model: on the meta device.
        workers: of the whole job.
        dtype_bytes: of the dtype that the job computes in.
    """
    resources = run.job.spec.resources
    saved = getattr(config, "dtype", None) if run.job.spec.model.config is None else None
    targets = find_targets(model)
    weights = dict(model.named_parameters())
    merged = [f"{name}.weight" for name in targets.linears] + list(targets.experts)
    return HostWork(
        workers=math.ceil(workers / (resources.max_nodes or resources.nodes or 1)),
        data_workers=spec.dataloader_num_workers,
        saved_bytes=getattr(saved, "itemsize", dtype_bytes),
        merges=spec.merges,
        by_tensor=not spec.merges or merges_by_tensor(run, config),
        dequantizes=run.job.spec.model.dequantize and quantization_method(config) is not None,
        composite=is_composite(config),
        largest=max(weight.numel() for weight in weights.values()),
        largest_merged=max((weights[name].numel() for name in merged if name in weights), default=0),
    )


def merges_by_tensor(run: RunConfig, config: PretrainedConfig) -> bool:
    """Return whether the names in the base's files let a merge go through them tensor by tensor.

    It is taken to be so where the files are not on this machine. What is wrong with them, preflight says.
    """
    if run.job.spec.model.config is not None or quantization_method(config) is not None:
        return True
    try:
        source = base_source(run, Storage(run.root))
        name = root_of(str(source.name))
        if not is_local(name, source.revision):
            return True
        base = open_base(name, auto_class("causal"), revision=source.revision)
        return base is not None and not base.lacking(base.written)
    except (UserError, Outage, OSError, ValueError):
        return True


def _loading(size: ModelSize, load: Workload, work: HostWork) -> int:
    """A tensor as it is read and as it is cast, for each worker that reads: under ZeRO-3 the first one alone.

    The files are mapped: their pages are the kernel's to drop, and all workers of a node share them.
    """
    readers = 1 if load.zero == 3 else work.workers
    copy = size.total * work.saved_bytes if work.dequantizes else 0
    return copy + readers * work.largest * (work.saved_bytes + load.dtype_bytes)


def _saving(size: ModelSize, load: Workload, work: HostWork) -> int:
    """The larger of a result and a checkpoint.

    A result of full training is one file on its way from a GPU at ZeRO-0, else the whole model in the dtype, as the
    workers put it together on the first one; a composite model is written into a copy of its base. An adapter is its
    own weights. A checkpoint of DeepSpeed's takes a worker's share of the master weights at a time.
    """
    whole = size.total * load.dtype_bytes
    if load.frozen:
        result = trainable(size, load) * (MASTER if load.zero == 0 else load.dtype_bytes)
    else:
        in_files = load.zero == 0 and (load.kind == "cuda" or load.dtype_bytes == MASTER)
        result = min(SHARD, whole) if in_files else whole
        result += whole if work.composite else 0
    share = math.ceil(trainable(size, load) * MASTER / load.workers) if load.zero else 0
    return max(result, work.workers * share)


def _merging(size: ModelSize, load: Workload, work: HostWork) -> int:
    """One file of the result; the largest merged weight as read, in float32, and what is added to it; the adapter.

    Where the merge can't go through the files: the base in float32, and PEFT's copy of a weight with what is added.
    """
    adapter = trainable(size, load) * (MASTER if load.adapter is not None else work.saved_bytes)
    if not work.by_tensor:
        return size.total * MASTER + 2 * work.largest_merged * MASTER + adapter
    shard = min(SHARD, size.total * work.saved_bytes)
    return shard + work.largest_merged * (work.saved_bytes + 2 * MASTER) + adapter
