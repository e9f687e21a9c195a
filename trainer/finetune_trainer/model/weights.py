"""Whether a saved model's weights are there and whole, by their sizes alone: nothing is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_HEADER_SIZE = 8


def weight_faults(directory: Path) -> Iterator[str]:
    """What keeps the weights of a saved model from loading."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
    except (ValueError, LookupError, TypeError, AttributeError):
        yield f"{index} is no index of weights"
        return
    for path in [directory / name for name in names or [SAFE_WEIGHTS_NAME]]:
        if not path.exists():
            yield f"{path} is not there{_pickled(directory)}"
        elif not _is_whole(path):
            yield f"{path} is damaged or was cut off"


def _pickled(directory: Path) -> str:
    found = sorted(path.name for path in directory.glob("*.bin"))
    return f", and {found[0]} is not loaded: save the weights as safetensors" if found else ""


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_HEADER_SIZE), "little")
        if _HEADER_SIZE + size > os.path.getsize(path):
            return False
        try:
            header = json.loads(file.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return _HEADER_SIZE + size + max(ends, default=0) == os.path.getsize(path)
