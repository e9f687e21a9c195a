"""Tokenizers, configurations and weights, loaded the same way by every stage."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from finetune_api.model import ModelSpec
from finetune_api.problems import Problem, did_you_mean
from finetune_api.training import Quantization
from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter import apply_adapter, is_expert_adapter
from finetune_trainer.model.precision import Precision
from finetune_trainer.model.saved import base_of, expert_base_of, root_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import SCORE, Task, as_reward, auto_class

SHARD_SIZE = "5GB"


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """The stage's tokenizer, with a padding token.

    Raises:
        UserError: there is none, or it can't be read.
    """
    if not source.tokenizer:
        raise UserError([Problem("model.tokenizer", "the model has no tokenizer: set it, or add a tokenizer stage")])
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, revision=source.revision)
    except (OSError, ValueError) as error:
        raise UserError([Problem("model", f"no tokenizer at {source.tokenizer!r}: {_first_line(error)}")]) from error
    if len(tokenizer) == len(tokenizer.all_special_ids):  # what transformers makes of a directory without its files
        raise UserError([Problem("model", f"no tokenizer at {source.tokenizer!r}: set model.tokenizer")])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: ModelSource, tokenizer: PreTrainedTokenizerFast | None) -> PretrainedConfig:
    """The configuration of the stage's model.

    Raises:
        UserError: unknown family or field, or nothing readable at the given place.
    """
    if source.config is not None:
        return build_config(source.config, tokenizer)
    assert source.name is not None
    name = root_of(source.name)
    try:
        return AutoConfig.from_pretrained(name, revision=source.revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError([Problem("model", f"no model at {name!r}: {_first_line(error)}")]) from error


def build_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> PretrainedConfig:
    """A configuration from a job's `model.config`, the vocabulary's size and special ids taken from the tokenizer.

    Raises:
        UserError: `model_type` or a field is unknown, or the vocabulary is smaller than the tokenizer's.
    """
    values = dict(fields)
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING_NAMES:
        hint = did_you_mean(str(family), CONFIG_MAPPING_NAMES) if family else ""
        problem = f"unknown model_type {family!r}{hint}" if family else "model_type is required, such as `qwen3`"
        raise UserError([Problem("model.config", problem)])
    unknown = _unknown_fields(family, values)
    if unknown:
        raise UserError(unknown)
    try:
        config = AutoConfig.for_model(family, **(_tokenizer_fields(tokenizer) | values))
    except StrictDataclassError as error:
        raise UserError([Problem("model.config", " ".join(str(error).split()))]) from error
    except (TypeError, ValueError) as error:
        raise UserError([Problem("model.config", _first_line(error))]) from error
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise UserError(
            [Problem("model.config.vocab_size", f"{config.vocab_size} is less than the tokenizer's {len(tokenizer)}")]
        )
    _check_heads(config)
    return config


def _check_heads(config: PretrainedConfig) -> None:
    """What transformers finds out no earlier than in the first forward pass."""
    heads, shared = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        message = f"{heads} attention heads can't share {shared}: expected a divisor of {heads}"
        raise UserError([Problem("model.config.num_key_value_heads", message)])


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens the model takes at once, or None where its configuration does not say."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None


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
            options["quantization_config"] = quantization_config(quantization, precision.compute, task)
        model = load_whole(base_of(source.name), auto, revision=source.revision, config=config, **options)
        if quantization is not None and quantization.bits == 4:
            keep_differentiable(model)
    model.config.use_cache = False
    return model


def load_whole(name: str, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
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


def quantization_config(spec: Quantization, compute: torch.dtype, task: Task = "causal") -> BitsAndBytesConfig:
    """bitsandbytes' configuration of a QLoRA base (arXiv 2305.14314). The output head is not quantized."""
    skipped = [SCORE] if task == "reward" else None
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


def _tokenizer_fields(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _unknown_fields(family: str, values: dict[str, Any]) -> list[Problem]:
    known = set(AutoConfig.for_model(family).to_dict()) | set(PretrainedConfig().to_dict())
    aliases = getattr(type(AutoConfig.for_model(family)), "attribute_map", {})
    valid = known | set(aliases) | _undeclared_fields(family)
    return [
        Problem("", f"unknown field `{name}` in model.config{did_you_mean(name, valid)}")
        for name in values
        if name not in valid
    ]


def _undeclared_fields(family: str) -> set[str]:
    """Fields that a family's code reads where they are set though its configuration declares none of the name.

    Published models rely on them: Qwen3-MoE's `head_dim`.
    """
    code = CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_")
    spec = find_spec(code)
    if spec is None or spec.origin is None:
        return set()
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', Path(spec.origin).read_text(encoding="utf-8")))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
