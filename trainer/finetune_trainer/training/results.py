"""A stage's result: a directory that transformers or PEFT load with nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from finetune_api.stages import EsftSpec, PretrainSpec
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.load import SHARD_SIZE
from finetune_trainer.model.saved import base_of
from finetune_trainer.model.task import as_reward, auto_class, task_of
from finetune_trainer.model.write_back import complete_result, in_base
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.expert_results import save_experts
from finetune_trainer.training.merging import merge_adapter, whole_source


def save_result(trainer: Any, context: StageContext, directory: Path) -> None:
    """Write the trained model and its tokenizer to `directory` on rank 0; every worker calls it (ZeRO-3 gathers)."""
    _save(trainer, context, directory)
    if context.placement.rank == 0:
        auto = auto_class(task_of(context.spec))
        complete_result(directory, context.source.name, context.source.revision, auto)


def _save(trainer: Any, context: StageContext, directory: Path) -> None:
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
    model.config.get_text_config().use_cache = True
    if is_composite(model.config):
        model, state = _in_base(model, state, context), None
    model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
    context.tokenizer.save_pretrained(directory)


def _in_base(model: PreTrainedModel, state: dict[str, Tensor], context: StageContext) -> PreTrainedModel:
    """A composite model as its base has it, the trained language model in place."""
    assert context.source.name is not None
    task, source = task_of(context.spec), context.source
    options = {"num_labels": 1} if task == "reward" else {}
    whole = in_base(source.name, source.revision, model, state, auto_class(task), **options)
    if task == "reward":
        as_reward(whole.config, context.tokenizer.pad_token_id)
    return whole


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
        assert source.name is not None
        pad = context.tokenizer.pad_token_id
        merge_adapter(base_of(source.name), source.revision, adapter, directory, task, pad)
    else:
        shutil.copytree(adapter, directory)
    context.tokenizer.save_pretrained(directory)
