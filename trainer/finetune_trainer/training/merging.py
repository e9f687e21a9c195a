"""Adapters merged into their bases: what a stage starts from, and what it leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock
from peft import PeftModel
from transformers import PreTrainedModel

from finetune_trainer.data.keys import digest
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.load import SHARD_SIZE, load_whole
from finetune_trainer.model.saved import base_of, is_adapter
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import Task, as_reward, auto_class
from finetune_trainer.training.context import StageContext


def merge_adapter(
    base: str, revision: str | None, adapter: Path, directory: Path, task: Task = "causal", pad: int | None = None
) -> None:
    """Merge an adapter into its base, on the CPU, in the precision that the base was saved in.

    The base is loaded anew, and is neither what QLoRA quantized it to (unsloth#1089) nor in the precision that the
    stage computed in. The sum is formed in float32 and rounded once.

    Args:
        pad: the padding token of a reward model, which is scored at the last other token.
    """
    model = _load(base, revision, task)
    whole, saved = model.dtype, {name: weight.dtype for name, weight in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model.float(), str(adapter)).merge_and_unload(safe_merge=True)
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to(saved.get(name, whole))
    if task == "reward":
        as_reward(merged.config, pad)
    _write(merged, directory)


def whole_source(context: StageContext) -> ModelSource:
    """The stage's source as a whole model: an adapter that the stage before carried on, of PEFT's or of
    experts, is merged on this machine."""
    name, revision = context.source.name, context.source.revision
    if name is None or not (is_adapter(name) or is_expert_adapter(name)):
        return context.source
    directory = Path(context.run.cache_dir, "merged", _key(name))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            part = directory.with_name(f".{directory.name}")
            shutil.rmtree(part, ignore_errors=True)
            if is_adapter(name):
                merge_adapter(base_of(name), revision, Path(name), part)
            else:
                _write(_load(name, None, "causal"), part)
            context.tokenizer.save_pretrained(part)
            part.rename(directory)
    return replace(context.source, name=str(directory), revision=None)


def _load(name: str, revision: str | None, task: Task) -> PreTrainedModel:
    """A whole model or an expert adapter on its base, in the precision that it was saved in."""
    options: dict[str, Any] = {"num_labels": 1} if task == "reward" else {}
    with undivided_loading():
        return load_whole(name, auto_class(task), revision=revision, dtype="auto", **options)


def _write(model: Any, directory: Path) -> None:
    model.should_save_on_this_rank = lambda _: True  # transformers would write on rank 0 alone, on one machine of many
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


def _key(adapter: str) -> str:
    """Another one for each adapter that ever lies at a place."""
    files = sorted(path for path in Path(adapter).iterdir() if path.is_file())
    return digest(adapter, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
