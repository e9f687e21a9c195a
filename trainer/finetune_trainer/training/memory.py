"""How much memory a worker uses, measured anew in each stage."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
"""What Linux takes to reset a process's peak of resident memory (proc(5), `clear_refs`)."""


@dataclass(frozen=True)
class Usage:
    """Bytes of one worker since its stage began.

    The driver's figures minus torch's are the CUDA context and what NCCL allocates itself. The driver counts the whole
    device, so another process on it is in `context` or `nccl`.
    """

    peak: int
    """Most bytes of tensors at a time on the device; on a CPU, most resident bytes of the process."""
    reserved: int | None = None
    """Most bytes that torch's allocator held, with what it keeps for later. None on a CPU, as the fields below."""
    context: int | None = None
    """The CUDA context and its kernels, as measured before the workers' first exchange."""
    nccl: int | None = None
    """What was allocated outside torch since then: NCCL's buffers, and kernels that were loaded later."""

    def to_json(self) -> dict[str, int]:
        """Return the known fields."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def reset_peaks(accelerator: bool) -> None:
    """Begin to measure anew. Without it a stage would report an earlier stage's peak."""
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        _CLEAR.write_text(_CLEAR_PEAK)


def context_bytes(accelerator: bool) -> int:
    """Return what the driver counts on this worker's device without torch's share, in bytes; 0 on a CPU.

    The first call creates the CUDA context. Before the workers' first exchange by NCCL it is all that there is.
    """
    return _outside() if accelerator else 0


def usage(accelerator: bool, context: int) -> Usage:
    """Return what this worker has used since `reset_peaks`.

    Args:
        context: `context_bytes` before the workers' first exchange.
    """
    if not accelerator:
        return Usage(_resident_peak())
    return Usage(
        peak=int(torch.cuda.max_memory_allocated()),
        reserved=int(torch.cuda.max_memory_reserved()),
        context=context,
        nccl=max(_outside() - context, 0),
    )


def _outside() -> int:
    free, total = torch.cuda.mem_get_info()
    return max(total - free - torch.cuda.memory_reserved(), 0)


def _resident_peak() -> int:
    """Return the peak since it was reset, else since the process began (getrusage counts KiB on Linux)."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
