"""Writes the result of a stage: a directory that transformers or PEFT can load without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from finetune_trainer.form import write_form
from finetune_trainer.generation.stop_tokens import unstopped, write_stops
from finetune_trainer.model.adapter import ADAPTER_WEIGHTS
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.composite_result import complete_result, merge_into_base
from finetune_trainer.model.load import SHARD_SIZE
from finetune_trainer.model.precision import round_weights
from finetune_trainer.model.reward_score import set_score_pad
from finetune_trainer.model.saved_model import is_adapter, root_of
from finetune_trainer.model.task import auto_class
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.expert_results import save_experts
from finetune_trainer.training.merging import merge_adapter, merged_source
from finetune_trainer.training.trained_weights import trained_weights


def save_result(trainer: Any, context: StageContext, directory: Path) -> None:
    """Write the trained model, its tokenizer, its stop tokens and its prompt format to `directory` on rank 0.

    Every worker calls it, because ZeRO-3 gathers the weights from all of them.
    """
    _save_weights(trainer, context, directory)
    if context.placement.rank == 0:
        task = context.spec.task
        complete_result(directory, context.source.name, context.source.revision, auto_class(task))
        generates = task == "causal"
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        settings = model.generation_config.to_diff_dict() if generates else None
        write_stops(directory, context.tokenizer, settings)
        if generates:
            write_form(directory, context.layout.title, context.data.report.forms)


def adapter_note(context: StageContext, directory: Path) -> str | None:
    """Return a note for users of a saved adapter if plain transformers would not stop at all its stop tokens."""
    base = context.source.name
    if base is None or not is_adapter(directory) or context.spec.task != "causal":
        return None
    missing = unstopped(root_of(base), context.source.revision, directory, context.tokenizer)
    if not missing:
        return None
    return (
        f"plain transformers uses the generation config of the adapter's base, which does not stop at "
        f"{', '.join(missing)}: pass generation_config=GenerationConfig.from_pretrained(RESULT), or `finetune merge` it"
    )


def _save_weights(trainer: Any, context: StageContext, directory: Path) -> None:
    if context.stage.esft is not None:
        save_experts(trainer, context, context.stage.esft, directory)
        return
    adapter = None if context.trains_base else directory.with_name("adapter")
    if context.placement.rank == 0:
        for path in (directory, *([adapter] if adapter else [])):
            shutil.rmtree(path, ignore_errors=True)
    if adapter is None:
        _save_model(trainer, context, directory)
        return
    _save_adapter(trainer, context, adapter)
    if context.placement.rank == 0:
        _finish_adapter(context, adapter, directory)
        shutil.rmtree(adapter, ignore_errors=True)


def _save_model(trainer: Any, context: StageContext, directory: Path) -> None:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if context.placement.rank != 0:
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    dtype = context.precision.result
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.config.dtype = dtype
    model.config.get_text_config().use_cache = True
    if context.spec.task == "reward":
        set_score_pad(model.config, context.tokenizer)
    if is_composite(model.config):
        model, state = _in_base(model, state, context), None
    model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
    context.tokenizer.save_pretrained(directory)


def _in_base(model: PreTrainedModel, state: dict[str, Tensor], context: StageContext) -> PreTrainedModel:
    """Return the complete composite model of the base, with the trained language model in place."""
    task, source = context.spec.task, context.source
    assert source.name is not None
    options = {"num_labels": 1} if task == "reward" else {}
    whole = merge_into_base(source.name, source.revision, model, state, auto_class(task), **options)
    if task == "reward":
        set_score_pad(whole.config, context.tokenizer)
    return whole


def _save_adapter(trainer: Any, context: StageContext, directory: Path) -> None:
    model, first = trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.is_world_process_zero()
    rows = context.config.get_text_config().vocab_size
    grown = model.get_base_model().config.get_text_config().vocab_size != rows
    state = trained_weights(model, keep=first, embeddings=grown)
    if first:
        model.save_pretrained(directory, state_dict=state, selected_adapters=["default"])


def _finish_adapter(context: StageContext, adapter: Path, directory: Path) -> None:
    if context.spec.merges:
        task = context.spec.task
        source = merged_source(context) if task == "reward" else context.source
        merge_adapter(context, source, adapter, directory, task)
    else:
        shutil.copytree(adapter, directory)
        round_weights(directory / ADAPTER_WEIGHTS, context.precision.result)
    context.tokenizer.save_pretrained(directory)
