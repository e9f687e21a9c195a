"""A stage's result: a directory that transformers or PEFT load with nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_api.stages import EsftSpec, PretrainSpec
from finetune_trainer.model.load import SHARD_SIZE
from finetune_trainer.model.task import task_of
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.expert_results import save_experts
from finetune_trainer.training.merging import merge_adapter, whole_source


def save_result(trainer: Any, context: StageContext, directory: Path) -> None:
    """Write the trained model and its tokenizer to `directory` on rank 0; every worker calls it (ZeRO-3 gathers)."""
    if isinstance(context.spec, EsftSpec):
        save_experts(trainer, context, context.spec, directory)
        return
    adapter = None if context.trains_base else directory.with_name("adapter")
    if context.placement.rank == 0:
        for path in (directory, *([adapter] if adapter else [])):
            shutil.rmtree(path, ignore_errors=True)
    if adapter is None:
        _save_whole(trainer, context, directory)
        return
    _save_adapter(trainer, adapter)
    if context.placement.rank == 0:
        _finish_adapter(context, adapter, directory)
        shutil.rmtree(adapter, ignore_errors=True)


def _save_whole(trainer: Any, context: StageContext, directory: Path) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if context.placement.rank != 0:
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    dtype = context.precision.result
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.config.dtype = dtype
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
    context.tokenizer.save_pretrained(directory)


def _save_adapter(trainer: Any, directory: Path) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.save_pretrained(directory, state_dict=state, selected_adapters=["default"])


def _finish_adapter(context: StageContext, adapter: Path, directory: Path) -> None:
    assert not isinstance(context.spec, (PretrainSpec, EsftSpec)) and context.spec.lora is not None
    if context.spec.lora.merge:
        task = task_of(context.spec)
        source = whole_source(context) if task == "reward" else context.source
        merge_adapter(context, source, adapter, directory, task)
    else:
        shutil.copytree(adapter, directory)
    context.tokenizer.save_pretrained(directory)
