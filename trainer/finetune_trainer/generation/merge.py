"""Merge an adapter into its base and save the result as a complete model."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.form import FORM_FILE
from finetune_trainer.generation.find_result import find_result
from finetune_trainer.generation.load import load, open_result
from finetune_trainer.generation.stop_tokens import write_stops
from finetune_trainer.model.adapter import merge_in_memory
from finetune_trainer.model.composite import AutoLanguageModel
from finetune_trainer.model.composite_result import complete_result
from finetune_trainer.model.load import SHARD_SIZE
from finetune_trainer.model.merged_files import plan_merge
from finetune_trainer.model.saved_model import is_adapter


def merge(result_dir: str, out: Path) -> None:
    """Save an adapter merged into its base, with the tokenizer, in the precision of the base.

    Trained experts replace those of the base; LoRA updates are added in float32 and rounded once. A quantized base is
    dequantized.

    Raises:
        UserError: there is no adapter at `result_dir`, it does not fit its base, transformers can't dequantize the
            base, or `out` exists.
    """
    directory = find_result(result_dir)
    if out.exists():
        raise UserError(f"{out} is there already: choose another directory")
    if not is_adapter(directory) and not is_expert_adapter(directory):
        raise UserError(f"{directory} holds a whole model: there is nothing to merge")
    with tempfile.TemporaryDirectory(prefix="finetune-") as plain:
        tokenizer = _by_tensor(directory, out, plain) or _whole(directory, out, plain)
    tokenizer.save_pretrained(out)
    complete_result(out, str(directory), None, AutoLanguageModel)
    write_stops(out, tokenizer)
    if (directory / FORM_FILE).is_file():
        shutil.copy(directory / FORM_FILE, out)


def _by_tensor(directory: Path, out: Path, plain: str) -> PreTrainedTokenizerBase | None:
    """Merge tensor by tensor from the base's files; return the tokenizer, or None if that is not possible.

    Args:
        plain: directory for a dequantized copy of a base with quantized weights.
    """
    try:
        base, tokenizer = open_result(directory, plain)
        merge = None if base is None else plan_merge(base, directory if is_adapter(directory) else None)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # `load` reports the cause
    if merge is None:
        return None
    merge.base.model.config.get_text_config().use_cache = True
    merge.write(out)
    return tokenizer


def _whole(directory: Path, out: Path, plain: str) -> PreTrainedTokenizerBase:
    """Merge the complete model in memory; return the tokenizer."""
    loaded = load(str(directory), device="cpu", dequantize_in=plain)
    model = loaded.model
    if isinstance(model, PeftModel):
        config: Any = model.get_base_model().config
        model = merge_in_memory(model, config.dtype or torch.float32)
    model.config.get_text_config().use_cache = True
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    return loaded.tokenizer
