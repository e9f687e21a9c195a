"""Weights, loaded the same way everywhere: from safetensors alone, and only where the checkpoint has all of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.model import ModelSpec
from finetune_api.problems import Problem
from finetune_api.training import Quantization
from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter import apply_adapter
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.hub import hub_access
from finetune_trainer.model.checkpoint_matching import Match, match_checkpoint, without_mapping
from finetune_trainer.model.composite import composite_skips, shrink_frozen
from finetune_trainer.model.config import load_config, read_config
from finetune_trainer.model.expert_matmul import compute_by_autocast
from finetune_trainer.model.generation import repair_generation
from finetune_trainer.model.precision import Precision
from finetune_trainer.model.prequantized import dequantized, method_of, training_fault
from finetune_trainer.model.right_padding import drop_right_padding
from finetune_trainer.model.saved_model import base_of, expert_base_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import SCORE, Task, as_reward, auto_class
from finetune_trainer.model.vocabulary import added_rows, resize_embeddings
from finetune_trainer.model.weights import SHARD_SIZE as SHARD_SIZE


@dataclass(frozen=True)
class JobModel:
    """What a job's `model` asks of every saved model that its stages train: `dequantize` and `resizeEmbeddings`."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    cache_dir: str
    """Dequantized copies lie below it."""


def load_model(
    source: ModelSource,
    job: JobModel,
    precision: Precision,
    *,
    task: Task = "causal",
    trains: bool = True,
    quantization: Quantization | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return the stage's model with its weights, on a device or, under ZeRO-3, divided among the workers as it loads.

    A LoRA result carried on as an adapter loads as its base model; the adapter is attached by the caller.

    Args:
        trains: whether the model is to be trained or quantized; weights that were saved quantized serve no more than
            inference.
        device: that the weights of a saved model are read onto, one tensor at a time, so that the host holds none of
            them. Default: the CPU, or where ZeRO-3 or a quantizer puts them.

    Raises:
        UserError: as `load_whole`.
    """
    auto = auto_class(task)
    options: dict[str, Any] = {"dtype": precision.weights}
    if job.spec.attn_implementation != "auto":
        options["attn_implementation"] = job.spec.attn_implementation
    config = load_config(source, job.tokenizer)
    if task == "reward":
        as_reward(config, job.tokenizer.pad_token_id)
    torch.manual_seed(seed)  # of weights that no file holds: all of them, or a reward model's head
    if source.config is not None:
        model = auto.from_config(config, trust_remote_code=False, **options)
        repair(model)
    else:
        assert source.name is not None
        if trains or quantization is not None:
            _require_trainable(source.name, config, job.spec)
        if quantization is None:
            options["device"] = device
        else:
            skipped = composite_skips(config, auto)
            options["quantization_config"] = quantization_config(quantization, precision.compute, task, skipped)
        more = {"revision": source.revision, "config": config, "job": job, "new_head": task == "reward"}
        model = load_whole(base_of(source.name), auto, **more, **options)
    shrink_frozen(model, precision)
    compute_by_autocast(model)
    drop_right_padding(model)
    model.config.get_text_config().use_cache = False
    return model


def load_whole(
    name: str,
    auto: Any = None,
    *,
    revision: str | None = None,
    config: PretrainedConfig | None = None,
    job: JobModel | None = None,
    new_head: bool = False,
    device: torch.device | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return a saved model, or the base of an expert adapter with the adapter's experts in place.

    Args:
        name: directory or hub id.
        auto: transformers' class that loads it. Default: of models that continue text.
        config: in place of the saved one.
        job: of the job that trains the model. Default: it is loaded as it was saved.
        new_head: whether the checkpoint may lack the head of `auto`'s task.
        device: see `load_model`.
        options: for `from_pretrained`.

    Raises:
        UserError: the checkpoint lacks weights or holds others than the model's, or the adapter does not fit.
        Outage: the hub does not answer.
    """
    auto = auto or auto_class("causal")
    if is_expert_adapter(name):
        model = load_whole(
            expert_base_of(name), auto, config=config, job=job, new_head=new_head, device=device, **options
        )
        apply_adapter(model, name)
        model.name_or_path = name  # PEFT records it as the base of an adapter trained on top
        return model
    with hub_access(name, "model", revision):
        place, revision, config = plain_place(name, revision, config or read_config(name, revision), job)
        model = _checked(place, auto, revision, config, new_head, options | _onto(device, config))
    repair(model)
    if getattr(model, "is_loaded_in_4bit", False):
        keep_differentiable(model)
    if job is not None and (rows := added_rows(job.spec, config, job.tokenizer)) is not None:
        resize_embeddings(model, rows)
    model.name_or_path = name
    return model


def _onto(device: torch.device | None, config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that read weights straight onto an accelerator.

    Weights that were saved quantized go where their quantizer puts them.
    """
    if device is None or device.type == "cpu" or method_of(config) is not None:
        return {}
    return {"device_map": {"": device}}


def plain_place(
    name: str, revision: str | None, config: PretrainedConfig, job: JobModel | None
) -> tuple[str, str | None, PretrainedConfig]:
    """Return the place, revision and configuration that a model loads from: its own, or those of a dequantized copy."""
    if job is None or not job.spec.dequantize or method_of(config) is None:
        return name, revision, config
    return dequantized(name, Path(job.cache_dir, "dequantized"), revision), None, _plain(config)


def _checked(
    name: str, auto: Any, revision: str | None, config: PretrainedConfig, new_head: bool, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a model whose checkpoint has all of its weights and no others."""
    quantized = method_of(config) is not None
    match = Match(config.model_type) if quantized else fitting(name, config, auto, revision, new_head)
    model, info = auto.from_pretrained(
        name,
        revision=revision,
        config=config,
        key_mapping=match.key_mapping or None,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    # Of weights that were saved quantized, only their quantizer knows the names.
    if lacking := sorted(set(info["missing_keys"]) - set(match.new)):
        raise UserError(f"{name}: {Match(type(model).__name__, missing=tuple(lacking)).summary()}")
    without_mapping(model, match)
    if "device_map" in options:
        vars(model).pop(
            "hf_device_map", None
        )  # trainers take a model that has one for a model that they must not move or divide
    return model


def fitting(name: str, config: PretrainedConfig, auto: Any, revision: str | None, new_head: bool) -> Match:
    """Return how a checkpoint's tensors match the model.

    Raises:
        UserError: weights are missing, or there are others than the model's.
    """
    match = match_checkpoint(name, config, auto, revision, new_head)
    if problems := list(match.problems()):
        raise UserError([Problem("", f"{name}: {problem}") for problem in problems])
    return match


def repair(model: PreTrainedModel) -> None:
    """Keep saving from failing once a trainer has changed the generation configuration."""
    if model.can_generate():
        repair_generation(model.generation_config)


def _require_trainable(name: str, config: PretrainedConfig, spec: ModelSpec) -> None:
    if fault := training_fault(config, spec.dequantize):
        raise UserError([Problem("model", f"{name}: {fault}")])


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a dequantized copy."""
    config = deepcopy(config)
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return config


def on_device(model: Any, device: torch.device) -> Any:
    """Return the model on a device; a quantized one stays where its quantizer has put it."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def quantization_config(
    spec: Quantization, compute: torch.dtype, task: Task = "causal", skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration of a QLoRA base (arXiv 2305.14314). The output head is not quantized.

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
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation, on CPUs with AVX512-BF16.

    Its first evaluation would repack them for a kernel that has no backward, computes in bfloat16 whatever the job
    asks for and fails on rows that 32 doesn't divide; training after it stays on that kernel (bitsandbytes 0.50.2),
    and nearly all of the gradient is lost without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
