"""Load a result with its tokenizer: a complete model, or an adapter and its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from finetune_api.model import ModelSpec
from finetune_trainer.errors import UserError
from finetune_trainer.form import Form, read_form
from finetune_trainer.generation.find_result import find_result
from finetune_trainer.generation.prompts import form_is_plain, has_template
from finetune_trainer.model.adapter import ADAPTER_WEIGHTS, attach_adapter
from finetune_trainer.model.base_files import open_base
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.config import load_tokenizer, read_config
from finetune_trainer.model.load import JobModel, load_whole, on_device
from finetune_trainer.model.saved_base import SavedBase
from finetune_trainer.model.saved_model import base_of, is_adapter, root_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import auto_class
from finetune_trainer.model.vocabulary import needed_rows, resize_embeddings

Kind = Literal["causal", "masked"]


@dataclass(frozen=True)
class Loaded:
    """A loaded model, in evaluation mode, on its device."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer. It has a padding token."""
    kind: Kind
    """`causal` or `masked` language model."""
    form: Form | None = None
    """Format of the training data; None if it is not known, as for models that are not the result of a job."""

    @property
    def asks_plainly(self) -> bool:
        """Whether prompts are used without the chat template although the tokenizer has one."""
        return form_is_plain(self.form) and has_template(self.tokenizer)


def load(result_dir: str, device: str = "auto", dequantize_in: str | None = None) -> Loaded:
    """Load a result of a job, the last result of a job's directory, or any saved transformers model or PEFT adapter.

    Weights are read from safetensors only, in the precision they were saved in. `device` is a torch device; `auto` is
    the first accelerator, else the CPU.

    Args:
        dequantize_in: directory for a dequantized copy of a base with quantized weights. Default: no dequantization.

    Raises:
        UserError: there is no loadable model at `result_dir`, or no such device.
    """
    target = _device(device)
    directory = find_result(result_dir)
    try:
        loaded = _read(directory, dequantize_in, target)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    on_device(loaded.model, target).eval()
    return loaded


def _read(directory: Path, dequantize_in: str | None, device: torch.device) -> Loaded:
    base = base_of(str(directory))
    tokenizer = _tokenizer(directory, base)
    plain = None
    if dequantize_in is not None:
        plain = JobModel(ModelSpec(path=base, dequantize=True), tokenizer, dequantize_in)
    model, kind = read_whole(base, job=plain, device=device)
    whole = _with_adapter(model, directory, tokenizer) if is_adapter(directory) else model
    return Loaded(whole, tokenizer, kind, read_form(directory))


def open_result(directory: Path, dequantize_in: str) -> tuple[SavedBase | None, PreTrainedTokenizerFast]:
    """Open the base of a PEFT or expert adapter for a merge tensor by tensor, and load the tokenizer.

    The base is None if it can only be merged as a complete model.

    Args:
        dequantize_in: directory for a dequantized copy of a base with quantized weights.

    Raises:
        UserError: as `load`.
    """
    base = base_of(str(directory))
    tokenizer, root = _tokenizer(directory, base), root_of(base)
    job = JobModel(ModelSpec(path=base, dequantize=True), tokenizer, dequantize_in)
    config = read_config(root)
    rows = added_rows_of(directory, config, tokenizer) if is_adapter(directory) else None
    return open_base(base, auto_class(_kind(config, root)), config=config, job=job, rows=rows), tokenizer


def read_whole(
    name: str, revision: str | None = None, job: JobModel | None = None, device: torch.device | None = None
) -> tuple[PreTrainedModel, Kind]:
    """Load a complete model, or an expert adapter with its base, in the saved precision.

    Args:
        revision: branch, tag or commit of a hub model.
        job: settings that change the model on loading. Default: as saved.
        device: device of the weights. Default: the CPU.

    Raises:
        UserError: the checkpoint lacks weights, or the adapter does not fit.
        Outage: the Hub does not respond.
    """
    config = read_config(root_of(name), revision)
    kind = _kind(config, root_of(name))
    more: dict[str, Any] = {"revision": revision, "config": config, "job": job, "device": device}
    return load_whole(name, auto_class(kind), dtype="auto", **more), kind


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not there: expected auto, cpu, cuda, cuda:1, …") from error


def _kind(config: PretrainedConfig, name: str) -> Kind:
    """Return the kind by the saved class, else by the family; a family with both is causal."""
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


def _tokenizer(directory: Path, base: str) -> PreTrainedTokenizerFast:
    own = (directory / "tokenizer_config.json").is_file() or (directory / "tokenizer.json").is_file()
    return load_tokenizer(ModelSource(base, None, None, str(directory) if own else base))


def _with_adapter(model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    if (rows := added_rows_of(directory, model.config, tokenizer)) is not None:
        resize_embeddings(model, rows)
    return attach_adapter(model, directory)


def added_rows_of(directory: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of embedding rows that an adapter needs, or None if the base has as many."""
    rows = _saved_rows(directory) or needed_rows(tokenizer)
    return rows if rows > config.get_text_config().vocab_size else None


def _saved_rows(directory: Path) -> int | None:
    """Return the number of embedding rows in an adapter's weights, where PEFT saves added rows, or None."""
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tables = [name for name in file.keys() if name.endswith((".embed_tokens.weight", ".wte.weight"))]  # noqa: SIM118
        return int(file.get_slice(tables[0]).get_shape()[0]) if tables else None
