"""Weights, loaded the same way by every stage."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.model import ModelSpec
from finetune_api.training import Quantization
from finetune_trainer.esft.adapter import apply_adapter
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.model.composite import AutoLanguageModel, composite_skips, shrink_frozen
from finetune_trainer.model.config import load_config
from finetune_trainer.model.precision import Precision
from finetune_trainer.model.saved import base_of, expert_base_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import SCORE, Task, as_reward, auto_class

SHARD_SIZE = "5GB"


def load_model(
    source: ModelSource,
    spec: ModelSpec,
    precision: Precision,
    tokenizer: PreTrainedTokenizerFast,
    *,
    task: Task = "causal",
    quantization: Quantization | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The stage's model with its weights, on the CPU or, under ZeRO-3, divided among the workers as it loads.

    A LoRA result carried on as an adapter loads as its base model; the adapter is attached by the caller.
    """
    auto = auto_class(task)
    options: dict[str, Any] = {"dtype": precision.weights}
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    config = load_config(source, tokenizer)
    if task == "reward":
        as_reward(config, tokenizer.pad_token_id)
    torch.manual_seed(seed)  # of weights that no file holds: all of them, or a reward model's head
    if source.config is not None:
        model = auto.from_config(config, **options)
    else:
        assert source.name is not None
        if quantization is not None:
            skipped = composite_skips(config, auto)
            options["quantization_config"] = quantization_config(quantization, precision.compute, task, skipped)
        model = load_whole(base_of(source.name), auto, revision=source.revision, config=config, **options)
        if quantization is not None and quantization.bits == 4:
            keep_differentiable(model)
    shrink_frozen(model, precision)
    model.config.get_text_config().use_cache = False
    return model


def load_whole(name: str, auto: Any = AutoLanguageModel, **options: Any) -> PreTrainedModel:
    """A saved model, or the base of an expert adapter with the adapter's experts in place, by safetensors alone.

    Args:
        name: directory or hub id.
        options: for `from_pretrained`.

    Raises:
        UserError: the adapter does not fit its base.
    """
    if not is_expert_adapter(name):
        model: PreTrainedModel = auto.from_pretrained(name, use_safetensors=True, **options)
        return model
    model = load_whole(expert_base_of(name), auto, **options)
    apply_adapter(model, name)
    model.name_or_path = name  # PEFT records it as the base of an adapter trained on top
    return model


def quantization_config(
    spec: Quantization, compute: torch.dtype, task: Task = "causal", skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """bitsandbytes' configuration of a QLoRA base (arXiv 2305.14314). The output head is not quantized.

    Args:
        skipped: modules that stay as they are; None: the output head alone.
    """
    if skipped is None and task == "reward":
        skipped = [SCORE]
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, on CPUs with AVX512-BF16.

    Its first evaluation would repack them for a kernel that has no backward, computes in bfloat16 whatever the job
    asks for and fails on rows that 32 doesn't divide; training after it stays on that kernel (bitsandbytes 0.50.2),
    and nearly all of the gradient is lost without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
