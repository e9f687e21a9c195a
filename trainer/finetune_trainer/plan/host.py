"""Host memory of the node with the highest usage: that of rank 0, which saves and merges."""

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
"""Maximum bytes of one file of a saved model (`model.weights.SHARD_SIZE`)."""
PROCESS = 3 << 30
"""Bytes of a GPU worker for torch, transformers, PEFT, DeepSpeed and CUDA libraries. Assumed, not measured."""
DRIVER = 2 << 30
"""Bytes of a node for Ray, its object store and the job's driver. Assumed, not measured."""
DATA_WORKER = 300 << 20
"""Bytes of a dataloader worker process. Assumed, not measured."""


@dataclass(frozen=True)
class HostWork:
    """Settings besides the device's workload that host memory depends on."""

    workers: int = 1
    """Workers per node."""
    data_workers: int = 0
    """Dataloader processes per worker."""
    saved_bytes: int = 2
    """Bytes per weight in the base model's files."""
    merges: bool = False
    """Whether the stage merges an adapter, or trained experts, into the base model."""
    by_tensor: bool = True
    """Whether the merge reads the base model tensor by tensor; else it loads all of it in float32."""
    dequantizes: bool = False
    """Whether a dequantized copy of the whole model is made first."""
    composite: bool = False
    largest: int = 0
    """Elements of the largest weight."""
    largest_merged: int = 0
    """Elements of the largest weight that an adapter changes."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of a node's host memory by part. Loading, saving and merging happen at different times.

    On CPU workers, the parts of `Memory` are in host memory too; they are not included here.
    """

    processes: int
    data: int
    """Dataloader processes."""
    offloaded: int
    """Optimizer states and weights that DeepSpeed offloads, in pinned memory on GPU nodes."""
    loading: int
    saving: int
    merging: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.processes + self.data + self.offloaded + max(self.loading, self.saving, self.merging)

    def parts(self) -> dict[str, int]:
        """Return the parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        named = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.parts().items() if size)
        return f"{human_bytes(self.total)} ({named})"


def host_estimate(size: ModelSize, load: Workload, memory: Memory, work: HostWork) -> HostMemory:
    """Return the host memory of rank 0's node."""
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
    """Return the settings of a stage that its host memory depends on.

    Args:
        model: the model, on the meta device.
        workers: world size of the job.
        dtype_bytes: bytes per element of the job's compute dtype.
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
    """Return whether the tensor names in the base model's files allow a merge tensor by tensor.

    Assume so if the files are not on this machine, or have errors, which preflight reports.
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
    """Return the bytes of one tensor as read and as cast, for each worker that reads (under ZeRO-3 only rank 0).

    The files are memory-mapped, so the kernel can evict their pages, and all workers of a node share them.
    """
    readers = 1 if load.zero == 3 else work.workers
    copy = size.total * work.saved_bytes if work.dequantizes else 0
    return copy + readers * work.largest * (work.saved_bytes + load.dtype_bytes)


def _saving(size: ModelSize, load: Workload, work: HostWork) -> int:
    """Return the bytes for saving the stage's result or a checkpoint, whichever is larger.

    The result of full training takes one file at ZeRO-0 on a GPU, else the whole model in the dtype, which is gathered
    on rank 0; a composite model also takes a copy of its base. An adapter takes its own weights. A DeepSpeed checkpoint
    takes each worker's partition of the master weights.
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
    """Return the bytes of a merge.

    Tensor by tensor: one output file, the adapter, and the largest merged weight as read, in float32, and its delta.
    Otherwise: the base model in float32, the adapter, and PEFT's copy of the largest merged weight with its delta.
    """
    adapter = trainable(size, load) * (MASTER if load.adapter is not None else work.saved_bytes)
    if not work.by_tensor:
        return size.total * MASTER + 2 * work.largest_merged * MASTER + adapter
    shard = min(SHARD, size.total * work.saved_bytes)
    return shard + work.largest_merged * (work.saved_bytes + 2 * MASTER) + adapter
