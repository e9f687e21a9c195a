"""Adapters (PEFT) put on their base models, with every weight that they should have."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, PeftType
from safetensors import safe_open
from transformers import PreTrainedModel

from finetune_trainer.errors import UserError
from finetune_trainer.model.expert_matmul import factor_adapters

ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAME = "default"
"""PEFT's name of the only adapter of a model."""
_SAVED = f".modules_to_save.{NAME}."


def attach_adapter(
    model: PreTrainedModel, directory: str | Path, *, trainable: bool = False, float32: bool = True
) -> PeftModel:
    """Put an adapter on its base, as `PeftModel.from_pretrained` does.

    PEFT only warns of weights that the file lacks, which then stay as they are initialised (the adapter does nothing),
    and of those that it holds under other names it says nothing.

    Args:
        float32: whether an adapter in half precision becomes float32, as PEFT has it by default.

    Raises:
        UserError: the file is not there, lacks a weight, or holds one that the model has no place for.
    """
    path = Path(directory, ADAPTER_WEIGHTS)
    if not path.is_file():
        raise UserError(f"{directory}: no {ADAPTER_WEIGHTS} (pickled weights are not loaded)")
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = not trainable
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    adapted: PeftModel = kind(model, config, NAME, autocast_adapter_dtype=float32)
    _refuse(path, "lacks", _unsaved(adapted, path))
    try:
        result = adapted.load_adapter(str(directory), NAME, is_trainable=trainable, autocast_adapter_dtype=float32)
    except RuntimeError as error:  # shapes
        raise UserError(f"{path} does not fit its base model: {' '.join(str(error).split())[:500]}") from error
    _refuse(path, "lacks", list(result.missing_keys) if config.peft_type == PeftType.LORA else [])
    # Of embeddings that are trained in full and got more rows, PEFT 0.21 saves a second copy under such names.
    foreign = [name for name in result.unexpected_keys if not name.endswith(".modules_to_save.weight")]
    _refuse(path, "does not fit the base model, which has no place for", foreign)
    factor_adapters(adapted)
    return adapted


def merge_in_memory(
    adapted: PeftModel, default: torch.dtype, saved: Mapping[str, torch.dtype] | None = None
) -> PreTrainedModel:
    """Merge an adapter into its base in float32, and round each weight once.

    Args:
        adapted: the base with its adapter.
        default: dtype of weights that are not in `saved`.
        saved: dtype of each weight of the base, by name.

    Raises:
        ValueError: a merged weight is not finite.
    """
    merged: Any = adapted.float()  # type: ignore[no-untyped-call]  # transformers has no types here
    merged = merged.merge_and_unload(safe_merge=True)
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to((saved or {}).get(name, default))
    model: PreTrainedModel = merged
    return model


def _unsaved(adapted: Any, path: Path) -> list[str]:
    """Return the weights of modules that were trained in full (`modules_to_save`) and are not in the file."""
    expected = [name for name in adapted.state_dict() if _SAVED in name]
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    return [name for name in expected if name.replace(_SAVED, ".") not in names]


def _refuse(path: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{path} {what} {len(names)} of the adapter's weights: {shown}")
