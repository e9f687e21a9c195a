"""Find the weight files of a saved model, check that they are complete, and list their tensors.

Only the headers of files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SHARD_SIZE = "5GB"
"""Maximum size of one file of saved weights."""
_DTYPES: Mapping[str, Any] = _TYPES
"""torch dtypes by their names in safetensors files."""


@dataclass(frozen=True)
class TensorFile:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


def weight_faults(directory: Path) -> Iterator[str]:
    """Yield a message for each file that keeps a saved model from loading: missing, damaged or pickled files."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        paths = _local_files(directory)
    except (ValueError, LookupError, TypeError, AttributeError):
        yield f"{index} is not an index of weights"
        return
    for path in paths:
        if not path.exists():
            yield f"{path} does not exist{_pickled(directory)}"
        elif not _is_complete(path):
            yield f"{path} is damaged or truncated"


def weight_files(name: str, revision: str | None = None, file_name: str | None = None) -> list[Path]:
    """Return the safetensors files of a directory or a hub id, downloaded if they are not cached.

    Args:
        file_name: the file that the model's configuration names (`transformers_weights`).

    Raises:
        OSError: there are none.
    """
    # from_pretrained finds the files with this function. `is_remote_code` (the second True) keeps it from asking a
    # service of the hub to convert pickled weights.
    from transformers.modeling_utils import DownloadKwargs, _get_resolved_checkpoint_files

    files, _ = _get_resolved_checkpoint_files(
        name, None, None, True, None, True, file_name, download_kwargs=DownloadKwargs(revision=revision)
    )
    return [Path(file) for file in files or ()]


def is_local(name: str, revision: str | None = None) -> bool:
    """Return whether a model's files are on this machine: in a directory, or all in the hub's cache."""
    if Path(name).is_dir():
        return True
    try:
        found = snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return False
    return not any(weight_faults(Path(found)))


def saved_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files by name, as float32 on the meta device: shapes without values.

    Raises:
        SafetensorError: a file is damaged.
    """
    return {name: torch.empty(one.shape, device="meta") for name, one in tensor_files(files).items()}


def tensor_files(files: Sequence[Path]) -> dict[str, TensorFile]:
    """Return the location of each tensor in safetensors files, by the tensor's name.

    Raises:
        SafetensorError: a file is damaged.
    """
    found: dict[str, TensorFile] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                one = opened.get_slice(name)
                found[name] = TensorFile(file, name, torch.Size(one.get_shape()), _DTYPES[one.get_dtype()])
    return found


def _local_files(directory: Path) -> list[Path]:
    """Return the files that transformers would read: a single file if it exists, else those of the index."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if (directory / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [directory / SAFE_WEIGHTS_NAME]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _pickled(directory: Path) -> str:
    found = sorted(path.name for path in directory.glob("*.bin"))
    return f", and {found[0]} is not loaded: save the weights as safetensors" if found else ""


def _is_complete(path: Path) -> bool:
    """Return whether a safetensors file has the length in its header."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
