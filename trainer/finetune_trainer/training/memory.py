"""Measures the memory that a worker uses in each stage."""

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
"""Written to `clear_refs`, it resets the peak of resident memory of a process (proc(5))."""


@dataclass(frozen=True)
class Usage:
    """Memory of one worker since its stage began, in bytes.

    The memory that the CUDA driver reports minus that of torch's allocator is the CUDA context and NCCL's buffers. The
    driver reports the whole device, so the memory of other processes on it is part of `context` or `nccl`.
    """

    peak: int
    """Peak of allocated tensors on the device; on a CPU, peak of resident memory of the process."""
    reserved: int | None = None
    """Peak of memory reserved by torch's allocator. None on a CPU, as the fields below."""
    context: int | None = None
    """CUDA context and kernels, measured before the workers' first collective operation."""
    nccl: int | None = None
    """Memory allocated outside torch since then: NCCL's buffers, and kernels that were loaded later."""

    def to_json(self) -> dict[str, int]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def reset_peaks(accelerator: bool) -> None:
    """Reset the peaks. Otherwise a stage would report the peak of an earlier stage."""
    if accelerator:
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not on Linux, or without permission
        _CLEAR.write_text(_CLEAR_PEAK)


def context_bytes(accelerator: bool) -> int:
    """Return the bytes that the CUDA driver reports for this worker's device minus those of torch; 0 on a CPU.

    The first call creates the CUDA context. Before the first NCCL operation this is the size of the context.
    """
    return _outside() if accelerator else 0


def usage(accelerator: bool, context: int) -> Usage:
    """Return the memory that this worker has used since `reset_peaks`.

    Args:
        accelerator: whether it uses a GPU.
        context: `context_bytes` before the workers' first collective operation.
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
    """Return the peak since it was reset, or else since the process began (getrusage returns KiB on Linux)."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
