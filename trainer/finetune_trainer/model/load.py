"""Load weights: only from safetensors, and only where the checkpoint has all weights of the model."""

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
from finetune_trainer.model.prequantized import dequantized, quantization_method, training_fault
from finetune_trainer.model.right_padding import drop_right_padding
from finetune_trainer.model.saved_model import base_of, expert_base_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import SCORE, Task, as_reward, auto_class
from finetune_trainer.model.vocabulary import added_rows, resize_embeddings
from finetune_trainer.model.weights import SHARD_SIZE as SHARD_SIZE


@dataclass(frozen=True)
class JobModel:
    """The settings of a job's `model` for every saved model that its stages train, such as `resizeEmbeddings`."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    cache_dir: str
    """Parent directory of dequantized copies."""


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

    For a LoRA result that the stage continues to train, return its base model; the caller attaches the adapter.

    Args:
        trains: whether the model is trained. Weights that were saved quantized can only be used for inference.
        device: where to read a saved model's weights, one tensor at a time, so that the host does not hold them all.
            Default: the CPU, or where ZeRO-3 or a quantizer puts them.

    Raises:
        UserError: see `load_whole`.
    """
    auto, config = auto_class(task), load_config(source, job.tokenizer)
    if task == "reward":
        as_reward(config, job.tokenizer.pad_token_id)
    attention, default = job.spec.attn_implementation, "auto"
    options: dict[str, Any] = {"dtype": precision.weights} | (
        {} if attention == default else {"attn_implementation": attention}
    )
    torch.manual_seed(seed)  # for weights that no file holds: all of them, or a reward model's head
    if source.name is None:
        model = _build(auto, config, options)
    else:
        if trains or quantization is not None:
            _require_trainable(source.name, config, job.spec)
        if quantization is not None:
            skipped = composite_skips(config, auto)
            options["quantization_config"] = quantization_config(quantization, precision.compute, task, skipped)
        options |= {"revision": source.revision, "config": config, "job": job, "new_head": task == "reward"}
        model = load_whole(base_of(source.name), auto, device=None if quantization else device, **options)
    return _prepared(model, precision)


def _build(auto: Any, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """Return a model with random weights."""
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=False, **options)
    repair(model)
    return model


def _prepared(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Return the model with the changes that every stage needs."""
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
    """Return a saved model. For an expert adapter: its base with the adapter's experts.

    Args:
        name: directory or hub id.
        auto: transformers' auto class that loads it. Default: the one for causal language models.
        config: overrides the saved configuration.
        job: settings of the job that trains the model. Default: the model is loaded as it was saved.
        new_head: whether the checkpoint may lack the head of `auto`'s task.

    Raises:
        UserError: the checkpoint lacks weights or holds unexpected ones, or the adapter does not fit.
        Outage: the hub does not answer.
    """
    auto = auto or auto_class("causal")
    if is_expert_adapter(name):
        options |= {"config": config, "job": job, "new_head": new_head, "device": device}
        return _with_experts(load_whole(expert_base_of(name), auto, **options), name)
    with hub_access(name, "model", revision):
        path, revision, config = resolve_weights(name, revision, config or read_config(name, revision), job)
        model = _load_checked(path, auto, revision, config, new_head, options | _device_options(device, config))
    repair(model)
    if getattr(model, "is_loaded_in_4bit", False):
        disable_avx512_repacking(model)
    if job is not None and (rows := added_rows(job.spec, config, job.tokenizer)) is not None:
        resize_embeddings(model, rows)
    model.name_or_path = name
    return model


def _with_experts(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    apply_adapter(model, adapter)
    model.name_or_path = adapter  # PEFT records it as the base of an adapter trained on top
    return model


def _device_options(device: torch.device | None, config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` reads weights directly onto an accelerator.

    A quantizer chooses the device of weights that were saved quantized.
    """
    if device is None or device.type == "cpu" or quantization_method(config) is not None:
        return {}
    return {"device_map": {"": device}}


def resolve_weights(
    name: str, revision: str | None, config: PretrainedConfig, job: JobModel | None
) -> tuple[str, str | None, PretrainedConfig]:
    """Return the name or path, revision and configuration to load: the model's own, or those of a dequantized copy."""
    if job is None or not job.spec.dequantize or quantization_method(config) is None:
        return name, revision, config
    return dequantized(name, Path(job.cache_dir, "dequantized"), revision), None, _without_quantization(config)


def _load_checked(
    name: str, auto: Any, revision: str | None, config: PretrainedConfig, new_head: bool, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a model after checking that its checkpoint has exactly the model's weights."""
    quantized = quantization_method(config) is not None
    match = Match(config.model_type) if quantized else require_match(name, config, auto, revision, new_head)
    model: PreTrainedModel
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
    # Only the quantizer knows the names of weights that were saved quantized.
    if lacking := sorted(set(info["missing_keys"]) - set(match.new)):
        raise UserError(f"{name}: {Match(type(model).__name__, missing=tuple(lacking)).summary()}")
    without_mapping(model, match)
    if "device_map" in options:
        vars(model).pop("hf_device_map", None)  # trainers neither move nor shard a model that has one
    return model


def require_match(name: str, config: PretrainedConfig, auto: Any, revision: str | None, new_head: bool) -> Match:
    """Return how a checkpoint's tensors match the model.

    Raises:
        UserError: the checkpoint lacks weights or holds unexpected ones.
    """
    match = match_checkpoint(name, config, auto, revision, new_head)
    if problems := list(match.problems()):
        raise UserError([Problem("", f"{name}: {problem}") for problem in problems])
    return match


def repair(model: PreTrainedModel) -> None:
    """Repair the generation configuration, so that it can be saved after a trainer has changed it."""
    if model.can_generate():
        repair_generation(model.generation_config)


def _require_trainable(name: str, config: PretrainedConfig, spec: ModelSpec) -> None:
    if fault := training_fault(config, spec.dequantize):
        raise UserError([Problem("model", f"{name}: {fault}")])


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a dequantized copy."""
    config = deepcopy(config)
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return config


def on_device(model: Any, device: torch.device) -> Any:
    """Return the model on a device; a quantized model stays on the device that its quantizer chose."""
    return model if getattr(model, "is_quantized", False) else model.to(device)


def quantization_config(
    spec: Quantization, compute: torch.dtype, task: Task = "causal", skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration for a QLoRA base (arXiv 2305.14314). The output head is not quantized.

    Args:
        skipped: modules that are not quantized. Default: the output head.
    """
    if skipped is None and task == "reward":
        skipped = [SCORE]
    options: dict[str, Any] = {"load_in_8bit": True}
    if spec.bits == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.quant_type,
            "bnb_4bit_use_double_quant": spec.double_quant,
            "bnb_4bit_compute_dtype": compute,
        }
    return BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options)  # type: ignore[no-untyped-call]


def disable_avx512_repacking(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation, on CPUs with AVX512-BF16.

    The repacked weights use a kernel that has no backward, always computes in bfloat16 and fails on rows whose length
    32 does not divide. Later training steps keep using that kernel (bitsandbytes 0.50.2) and silently lose nearly all
    of the gradient.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
