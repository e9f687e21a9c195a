"""Adapters merged into their bases: what a stage starts from, and what it leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedModel

from finetune_trainer.data.cache_keys import digest
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.adapter import attach_adapter
from finetune_trainer.model.base_files import open_base
from finetune_trainer.model.config import read_config
from finetune_trainer.model.load import SHARD_SIZE, JobModel, load_whole
from finetune_trainer.model.merged_files import plan_merge
from finetune_trainer.model.reward_score import set_score_pad
from finetune_trainer.model.saved_base import SavedBase
from finetune_trainer.model.saved_model import base_of, is_adapter, root_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import Task, as_reward, auto_class
from finetune_trainer.training.context import StageContext


def merge_adapter(context: StageContext, source: ModelSource, adapter: Path, directory: Path, task: Task) -> None:
    """Merge an adapter into the base of `source`, on the CPU, in the precision that the base was saved in.

    The base is read anew, and is neither what QLoRA quantized it to (unsloth#1089) nor in the precision that the stage
    computed in. Each sum is formed in float32 and rounded once. The merge goes through the base's files tensor by
    tensor, where that is possible; else it holds the whole base in float32.

    Raises:
        UserError: the base or the adapter lacks weights, or a merged weight is not finite.
    """
    assert source.name is not None
    base = _opened(base_of(source.name), source.revision, task, context.job_model)
    merge = None if base is None else plan_merge(base, adapter)
    if merge is None:
        _merge_whole(context, source, adapter, directory, task)
        return
    if task == "reward":
        set_score_pad(merge.base.model.config, context.tokenizer)
    merge.write(directory)


def _merge_whole(context: StageContext, source: ModelSource, adapter: Path, directory: Path, task: Task) -> None:
    """Merge as `merge_adapter`, by PEFT on the whole model in memory."""
    model = _load(base_of(str(source.name)), source.revision, task, context.job_model)
    whole, saved = model.dtype, {name: weight.dtype for name, weight in model.state_dict().items()}
    merged: Any = attach_adapter(model.float(), adapter)
    merged = merged.merge_and_unload(safe_merge=True)
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to(saved.get(name, whole))
    if task == "reward":
        set_score_pad(merged.config, context.tokenizer)
    _write(merged, directory)


def whole_source(context: StageContext) -> ModelSource:
    """Return the stage's source as a whole model: an adapter that the stage before carried on, of PEFT's or of
    experts, is merged on this machine."""
    name = context.source.name
    if name is None or not (is_adapter(name) or is_expert_adapter(name)):
        return context.source
    directory = Path(context.run.cache_dir, "merged", _key(name))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            part = directory.with_name(f".{directory.name}")
            shutil.rmtree(part, ignore_errors=True)
            if is_adapter(name):
                merge_adapter(context, context.source, Path(name), part, "causal")
            else:
                _write_experts(context, name, part)
            context.tokenizer.save_pretrained(part)
            part.rename(directory)
    return replace(context.source, name=str(directory), revision=None)


def _write_experts(context: StageContext, name: str, directory: Path) -> None:
    """Write an expert adapter and its base as one model."""
    base = _opened(name, None, "causal", context.job_model)
    merge = None if base is None else plan_merge(base)
    if merge is None:
        _write(_load(name, None, "causal", context.job_model), directory)
    else:
        merge.write(directory)


def _opened(name: str, revision: str | None, task: Task, job: JobModel) -> SavedBase | None:
    reward = task == "reward"
    config = as_reward(read_config(root_of(name), revision), None) if reward else None
    return open_base(name, auto_class(task), revision=revision, config=config, job=job, new_head=reward)


def _load(name: str, revision: str | None, task: Task, job: JobModel) -> PreTrainedModel:
    """Return a whole model or an expert adapter on its base, in the precision that it was saved in."""
    reward = task == "reward"
    config = as_reward(read_config(root_of(name), revision), None) if reward else None
    with undivided_loading():
        return load_whole(
            name, auto_class(task), revision=revision, config=config, job=job, new_head=reward, dtype="auto"
        )


def _write(model: Any, directory: Path) -> None:
    model.should_save_on_this_rank = lambda _: True  # transformers would write on rank 0 alone, on one machine of many
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


def _key(adapter: str) -> str:
    """Another one for each adapter that ever lies at a place."""
    files = sorted(path for path in Path(adapter).iterdir() if path.is_file())
    return digest(adapter, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
