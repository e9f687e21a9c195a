"""The weight files of a saved model: which ones transformers reads, whether they are whole, what tensors they hold.

Only the files' headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as _DTYPES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SHARD_SIZE = "5GB"
"""Largest file that a model's weights are saved in."""


@dataclass(frozen=True)
class TensorFile:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


def weight_faults(directory: Path) -> Iterator[str]:
    """Yield what keeps the weights of a saved model from loading: files that are missing, damaged or pickled."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        paths = _local_files(directory)
    except (ValueError, LookupError, TypeError, AttributeError):
        yield f"{index} is no index of weights"
        return
    for path in paths:
        if not path.exists():
            yield f"{path} is not there{_pickled(directory)}"
        elif not _is_whole(path):
            yield f"{path} is damaged or was cut off"


def weight_files(name: str, revision: str | None = None, given: str | None = None) -> list[Path]:
    """Return the safetensors files of a model, in a directory or from the hub, downloaded where they are not cached.

    Args:
        given: the file that the model's configuration names (`transformers_weights`).

    Raises:
        OSError: there are none.
    """
    # The function by which from_pretrained finds them. `is_remote_code` (the second True) keeps it from asking a
    # service of the hub to convert pickled weights.
    from transformers.modeling_utils import DownloadKwargs, _get_resolved_checkpoint_files

    files, _ = _get_resolved_checkpoint_files(
        name, None, None, True, None, True, given, download_kwargs=DownloadKwargs(revision=revision)
    )
    return [Path(file) for file in files or ()]


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether a model's files are on this machine: in a directory, or all in the hub's cache."""
    if Path(name).is_dir():
        return True
    try:
        found = snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return False
    return not any(weight_faults(Path(found)))


def saved_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files by name, on the meta device: shapes without values, as float32.

    Raises:
        SafetensorError: a file is damaged.
    """
    return {name: torch.empty(one.shape, device="meta") for name, one in tensor_files(files).items()}


def tensor_files(files: Sequence[Path]) -> dict[str, TensorFile]:
    """Return where each tensor of safetensors files is, by its name.

    Raises:
        SafetensorError: a file is damaged.
    """
    found: dict[str, TensorFile] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                one = opened.get_slice(name)
                found[name] = TensorFile(file, name, torch.Size(one.get_shape()), _DTYPES[one.get_dtype()])
    return found


def _local_files(directory: Path) -> list[Path]:
    """Return the files that transformers would read: a single one before an index of several."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if (directory / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [directory / SAFE_WEIGHTS_NAME]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _pickled(directory: Path) -> str:
    found = sorted(path.name for path in directory.glob("*.bin"))
    return f", and {found[0]} is not loaded: save the weights as safetensors" if found else ""


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
