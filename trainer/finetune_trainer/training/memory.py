"""How much memory a worker has used."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(accelerator: bool) -> int:
    """Peak bytes: allocated on the device, or resident in this process (getrusage counts KiB on Linux)."""
    if accelerator:
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
