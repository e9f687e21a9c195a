"""Writes the result of an `esft` stage: a complete model, or only the trained experts, as an adapter of their base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_api.stages import EsftSpec
from finetune_trainer.esft.adapter import apply_tensors, trained_tensors, write_adapter
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.base_files import open_base
from finetune_trainer.model.load import SHARD_SIZE, load_whole
from finetune_trainer.model.merged_files import plan_merge
from finetune_trainer.model.task import auto_class
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import StageContext


def save_experts(trainer: Any, context: StageContext, spec: EsftSpec, directory: Path) -> None:
    """Write the result and the tokenizer to `directory` on rank 0. Every worker calls it, because ZeRO-3 gathers."""
    first, config = context.placement.rank == 0, trainer.stage.experts
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    tensors = trained_tensors(model, config, context.precision.result, keep=first)
    if not first:
        return
    shutil.rmtree(directory, ignore_errors=True)
    assert context.source.name is not None
    if spec.merge:
        _write_whole(context, context.source.name, config, tensors, directory)
    else:
        write_adapter(directory, tensors, config, context.source.name)
    context.tokenizer.save_pretrained(directory)
    save_scores(context, directory)


def save_scores(context: StageContext, directory: Path) -> Path:
    """Copy the stage's files about its experts (configuration, scores, load) into `directory`, and return it."""
    storage, layout = Storage(context.run.root), context.layout
    directory.mkdir(parents=True, exist_ok=True)
    for relative in (layout.expert_config, layout.expert_scores, layout.expert_load):
        target = directory / relative.rpartition("/")[2]
        if not target.exists():  # the configuration of an adapter exists already and names its base
            target.write_bytes(storage.read_bytes(relative))
    return directory


def _write_whole(
    context: StageContext, base: str, config: ExpertConfig, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Write the base with the trained tensors in place. All other weights are copied from disk, bit by bit."""
    dtype, revision, job = context.precision.result, context.source.revision, context.job_model
    opened = open_base(base, auto_class("causal"), revision=revision, job=job, dtype=dtype)
    replaced = None if opened is None else opened.with_tensors(tensors)
    merge = None if replaced is None else plan_merge(replaced)
    if merge is not None:
        merge.write(directory)
        return
    with undivided_loading():
        model = load_whole(base, revision=revision, job=job, dtype=dtype)
    apply_tensors(model, config, tensors)
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
