"""Save a composite model: the trained language model, and every other part bit-identical to the base's.

A stage may hold the other parts in another dtype than the base's checkpoint (a bfloat16 job on a float32 checkpoint, or
a checkpoint of mixed precision), so their tensors are copied from the base's files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.composite import language_names
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.processor_files import copy_processor
from finetune_trainer.model.saved_model import MODEL_CONFIG, root_of

_PATTERN = "*.safetensors"


def merge_into_base(
    base: str, revision: str | None, trained: PreTrainedModel, state: Mapping[str, Tensor], auto: Any, **options: Any
) -> PreTrainedModel:
    """Return the base on the CPU with the trained language model, under the names of the base's checkpoint.

    A model that was loaded under ZeRO-3 does not keep the names of its checkpoint.

    Args:
        base: directory or hub id; for an adapter, the whole model below it is loaded.
        trained: the model that supplies the vocabulary size and the generation configuration.
        state: trained tensors by their names in the model; tensors of frozen parts are ignored.
        auto: the auto class that loads the model.
        options: for `from_pretrained`.
    """
    with undivided_loading():
        model: PreTrainedModel = auto.from_pretrained(
            root_of(base),
            revision=revision,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    inside = language_names(model)
    weights = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if inside(name):
            weights[name].data = tensor
    model.config.get_text_config().vocab_size = trained.config.get_text_config().vocab_size
    if model.can_generate():
        model.generation_config = trained.generation_config
    return model


def complete_result(directory: Path, base: str | None, revision: str | None, auto: Any) -> None:
    """Add the frozen parts and the processor to a composite model's result; do nothing for other models.

    Args:
        directory: holds a saved model, or an adapter, to which only the processor is added.
        base: the model that the stage started from, a directory or hub id; an adapter's base is looked up.
        auto: the auto class that loads the model.
    """
    if base is None:
        return
    root = root_of(base)
    whole = (directory / MODEL_CONFIG).is_file()
    if not is_composite(_config(str(directory) if whole else root, None if whole else revision)):
        return
    if whole:
        frozen = _restore_frozen(directory, root, revision, auto)
        _write_dtype(directory, frozen)
    copy_processor(base, revision if base == root else None, directory)
    copy_processor(root, revision, directory)


def _restore_frozen(directory: Path, base: str, revision: str | None, auto: Any) -> set[str]:
    """Overwrite the frozen parts' tensors with the base's where dtype or value differ; return their names."""
    with undivided_loading():
        names = _frozen_in_files(auto.from_pretrained(str(directory), device_map="meta", trust_remote_code=False))
    files = _tensor_files(base, revision)
    for path in sorted(directory.glob(_PATTERN)):
        tensors = load_file(path)
        kept = {name: _read_tensor(files[name], name) for name in names & tensors.keys() & files.keys()}
        changed = {name: tensor for name, tensor in kept.items() if not _is_identical(tensor, tensors[name])}
        if changed:
            save_file(tensors | changed, path, metadata={"format": "pt"})
    return names


def _frozen_in_files(model: PreTrainedModel) -> set[str]:
    """Return the names of the frozen parts' tensors in the model's files.

    transformers may split, join and rename tensors when it saves (stacked experts). float32 marks the frozen tensors
    through that conversion; joined with a float64 tensor of the language model, the result is float64.
    """
    inside = language_names(model)
    probes = {
        name: torch.empty(tensor.shape, dtype=torch.float64 if inside(name) else torch.float32, device="meta")
        for name, tensor in model.state_dict().items()
    }
    return {name for name, tensor in revert_weight_conversion(model, probes).items() if tensor.dtype == torch.float32}


def _write_dtype(directory: Path, frozen: set[str]) -> None:
    """Write the wider dtype of trained and frozen parts to the configuration: `dtype="auto"` then rounds neither."""
    sizes: dict[bool, Counter[torch.dtype]] = {True: Counter(), False: Counter()}
    for path in directory.glob(_PATTERN):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point():
                sizes[name in frozen][tensor.dtype] += tensor.numel()
    common = [counts.most_common(1)[0][0] for counts in sizes.values() if counts]
    dtype = str(reduce(torch.promote_types, common)).removeprefix("torch.")
    path = directory / MODEL_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(name: str, revision: str | None) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return config


def _tensor_files(name: str, revision: str | None) -> dict[str, str]:
    """Return the path of each tensor's file, by the tensor's name."""
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME, revision)
    parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else [SAFE_WEIGHTS_NAME]
    found: dict[str, str] = {}
    for part in parts:
        path = _find(name, part, revision)
        assert path is not None, f"{name} has been loaded from {part}"
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _find(name: str, file: str, revision: str | None) -> str | None:
    path: str | None = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


def _read_tensor(path: str, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _is_identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, so that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
