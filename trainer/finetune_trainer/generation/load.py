"""Load a result: a whole model or an adapter on its base, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter import apply_adapter
from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.generation.result import find_result
from finetune_trainer.model.composite import AutoLanguageModel
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.saved import MODEL_CONFIG, base_of, expert_base_of, is_adapter

Kind = Literal["causal", "masked"]
_CLASSES: dict[Kind, Any] = {"causal": AutoLanguageModel, "masked": AutoModelForMaskedLM}


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, in evaluation mode, on its device."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    """Has a padding token."""
    kind: Kind
    """`causal` continues text, `masked` fills masks."""


def load(result_dir: str, device: str = "auto") -> Loaded:
    """Load a result of a job, the last result of a job's directory, or any saved transformers model or PEFT adapter.

    Weights are read from safetensors only, in the precision they were saved in. `device` is a torch device; `auto` is
    the first accelerator, else the CPU.

    Raises:
        UserError: there is no loadable model at `result_dir`, or no such device.
    """
    place = _device(device)
    directory = find_result(result_dir)
    try:
        loaded = _read(directory)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    loaded.model.to(place)  # type: ignore[arg-type]  # transformers' stub of `to` misses its parameters
    loaded.model.eval()
    return loaded


def _read(directory: Path) -> Loaded:
    base = base_of(str(directory))
    model, kind = read_whole(base)
    tokenizer = _tokenizer(directory, base)
    if is_adapter(directory):
        return Loaded(_with_adapter(model, directory, tokenizer), tokenizer, kind)
    return Loaded(model, tokenizer, kind)


def read_whole(name: str, revision: str | None = None) -> tuple[PreTrainedModel, Kind]:
    """A whole model, or an expert adapter on its base, wherever a moved job now has that, in its own precision.

    Args:
        revision: branch, tag or commit of a hub model.

    Raises:
        UserError: weights are missing, or the adapter does not fit.
    """
    if is_expert_adapter(name):
        model, kind = read_whole(expert_base_of(name))
        apply_adapter(model, name)
        return model, kind
    config = AutoConfig.from_pretrained(name, revision=revision)
    kind = _kind(config, name)
    return _weights(name, config, kind, revision), kind


def _weights(base: str, config: PretrainedConfig, kind: Kind, revision: str | None) -> PreTrainedModel:
    model, info = _CLASSES[kind].from_pretrained(
        base,
        revision=revision,
        config=config,
        dtype="auto",
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers and a warning: the answers would be noise.
    faults = [*sorted(info["missing_keys"]), *sorted(name for name, *_ in info["mismatched_keys"])]
    if faults:
        listed = ", ".join(faults[:3]) + (", …" if len(faults) > 3 else "")
        raise UserError(f"{base}: {len(faults)} weights are missing or do not fit its {MODEL_CONFIG}: {listed}")
    return cast(PreTrainedModel, model)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not there: expected auto, cpu, cuda, cuda:1, …") from error


def _kind(config: PretrainedConfig, name: str) -> Kind:
    """By the saved class; where none is recorded, causal before masked."""
    family, saved = str(config.model_type), " ".join(config.architectures or [])
    if "ForSequenceClassification" in saved:
        raise UserError(f"{name} holds a reward model, which scores texts and continues none")
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and ("MaskedLM" in saved or "PreTraining" in saved):
        return "masked"
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or is_composite(config):
        return "causal"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked"
    raise UserError(f"{name}: a {family!r} model neither continues text nor fills masks")


def _tokenizer(directory: Path, base: str) -> PreTrainedTokenizerBase:
    own = (directory / "tokenizer_config.json").is_file() or (directory / "tokenizer.json").is_file()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory) if own else base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _with_adapter(model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    if not (directory / "adapter_model.safetensors").is_file():
        raise UserError(f"{directory}: no adapter_model.safetensors (pickled weights are not loaded)")
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(directory))
