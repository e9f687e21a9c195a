"""Attach PEFT adapters to their base models and check that no weight is missing."""

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
    """Attach an adapter to its base model as `PeftModel.from_pretrained` does, and refuse an incomplete one.

    PEFT only warns about weights that the file lacks, which then keep their initial values (the adapter has no
    effect), and does not report weights with unexpected names.

    Args:
        float32: whether an adapter in half precision is converted to float32, as PEFT does by default.

    Raises:
        UserError: the file does not exist, lacks a weight, or holds one that the model does not have.
    """
    path = Path(directory, ADAPTER_WEIGHTS)
    if not path.is_file():
        raise UserError(f"{directory}: no {ADAPTER_WEIGHTS} (pickled weights are not loaded)")
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = not trainable
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    adapter_model: PeftModel = kind(model, config, NAME, autocast_adapter_dtype=float32)
    _require_none(path, "lacks", _missing_from_file(adapter_model, path))
    try:
        result = adapter_model.load_adapter(
            str(directory), NAME, is_trainable=trainable, autocast_adapter_dtype=float32
        )
    except RuntimeError as error:  # shapes
        raise UserError(f"{path} does not fit its base model: {' '.join(str(error).split())[:500]}") from error
    _require_none(path, "lacks", list(result.missing_keys) if config.peft_type == PeftType.LORA else [])
    # PEFT 0.21 saves a second copy, with such a name, of embeddings that were resized and trained in full.
    foreign = [name for name in result.unexpected_keys if not name.endswith(".modules_to_save.weight")]
    _require_none(path, "does not fit the base model, which has no place for", foreign)
    factor_adapters(adapter_model)
    return adapter_model


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
    merged: Any = adapted.float()
    merged = merged.merge_and_unload(safe_merge=True)
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to((saved or {}).get(name, default))
    model: PreTrainedModel = merged
    return model


def _missing_from_file(adapter_model: Any, path: Path) -> list[str]:
    """Return the weights of modules that were trained in full (`modules_to_save`) and are not in the file."""
    expected = [name for name in adapter_model.state_dict() if _SAVED in name]
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    return [name for name in expected if name.replace(_SAVED, ".") not in names]


def _require_none(path: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{path} {what} {len(names)} of the adapter's weights: {shown}")
