"""Merges adapters into their bases: those of the previous stage, and the result of a stage."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedModel

from finetune_trainer.data.cache_keys import digest
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.adapter import attach_adapter, merge_in_memory
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
    """Merge an adapter into the base of `source`, on the CPU, in the precision in which the base was saved.

    The base is read from disk, because the trained one may be quantized (unsloth#1089) or in the stage's compute dtype.
    Each sum is computed in float32 and rounded once. If possible, the base's files are merged tensor by tensor;
    otherwise the whole base is held in memory in float32.

    Args:
        context: the stage.
        source: the base, or an adapter whose base is used.
        adapter: directory of the adapter.
        directory: directory of the merged model.
        task: task of the model.

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
    """Merge by PEFT, with the whole model in memory."""
    model = _load(base_of(str(source.name)), source.revision, task, context.job_model)
    default, saved = model.dtype, {name: weight.dtype for name, weight in model.state_dict().items()}
    adapted = attach_adapter(model.float(), adapter)  # type: ignore[no-untyped-call]  # transformers has no types here
    merged = merge_in_memory(adapted, default, saved)
    if task == "reward":
        set_score_pad(merged.config, context.tokenizer)
    _write(merged, directory)


def merged_source(context: StageContext) -> ModelSource:
    """Return the stage's source as a complete model.

    If the previous stage has left an adapter, of PEFT or of experts, it is merged into this machine's cache.
    """
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
    """Return a complete model, or the base of an expert adapter with its experts, in the saved precision."""
    reward = task == "reward"
    config = as_reward(read_config(root_of(name), revision), None) if reward else None
    with undivided_loading():
        return load_whole(
            name, auto_class(task), revision=revision, config=config, job=job, new_head=reward, dtype="auto"
        )


def _write(model: Any, directory: Path) -> None:
    model.should_save_on_this_rank = lambda _: True  # transformers would write on rank 0 only, but each node needs it
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


def _key(adapter: str) -> str:
    """Return a cache key that changes with the path, the sizes and the modification times of the adapter's files."""
    files = sorted(path for path in Path(adapter).iterdir() if path.is_file())
    return digest(adapter, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
