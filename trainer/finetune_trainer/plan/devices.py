"""Peak FLOP/s and memory of accelerators, and detection of the local device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from finetune_trainer.host_memory import host_memory


@dataclass(frozen=True)
class Peak:
    """Dense peak of a device in TFLOP/s, without sparsity; None if the device does not support the dtype.

    The half-precision peaks have float32 accumulation, as in torch. The float32 peak is without TF32, torch's default.
    """

    pattern: str
    """Regular expression to search in the result of `torch.cuda.get_device_name`."""
    bfloat16: float | None
    float16: float | None
    float32: float


# Sources: data sheets and architecture papers of NVIDIA (Ampere GA102, Ada, Blackwell RTX) and AMD; half of the figure
# "with sparsity" if only that is published. The first match counts, so variants come before their family.
PEAKS = (
    Peak(r"\bGB[23]00\b", 2500, 2500, 80),
    Peak(r"\bB[23]00\b", 2250, 2250, 75),
    Peak(r"\bH[12]00 NVL\b", 835.5, 835.5, 60),
    Peak(r"\bH100 PCIe\b", 756, 756, 51),
    Peak(r"\bG?H[12]00\b", 989.4, 989.4, 67),
    Peak(r"\bH20\b", 148, 148, 44),
    Peak(r"\bA100\b", 312, 312, 19.5),
    Peak(r"\bA40\b", 149.7, 149.7, 37.4),
    Peak(r"\bA30\b", 165, 165, 10.3),
    Peak(r"\bA10\b", 125, 125, 31.2),
    Peak(r"\bA10G\b", 70, 70, 35),
    Peak(r"\bL40S\b", 362, 362, 91.6),
    Peak(r"\bL40\b", 181, 181, 90.5),
    Peak(r"\bL4\b", 121, 121, 30.3),
    Peak(r"\bT4\b", None, 65, 8.1),
    Peak(r"\bV100-PCIE\b", None, 112, 14),
    Peak(r"\bV100\b", None, 125, 15.7),
    Peak(r"\bRTX 6000 Ada\b", 364.2, 364.2, 91.1),
    Peak(r"\bRTX A6000\b", 154.8, 154.8, 38.7),
    Peak(r"\bRTX A5000\b", 111.1, 111.1, 27.8),
    Peak(r"\bRTX 5090$", 209.5, 209.5, 104.8),
    Peak(r"\bRTX 4090$", 165.2, 165.2, 82.6),
    Peak(r"\bRTX 3090 Ti$", 80, 80, 40),
    Peak(r"\bRTX 3090$", 71, 71, 35.6),
    Peak(r"\bMI300X\b", 1307.4, 1307.4, 163.4),
)

# Memory in GiB as the driver reports it, for plans made on another machine.
MEMORIES = {
    "T4": 15, "V100-16GB": 16, "V100-32GB": 32, "A10": 22, "A10G": 22, "A30": 24, "A40": 45, "L4": 22, "L40": 44,
    "L40S": 44, "A100-40GB": 40, "A100-80GB": 80, "H100 PCIe": 80, "H100": 80, "H100 NVL": 94, "H200": 140,
    "B200": 179, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "RTX A6000": 48, "RTX 6000 Ada": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Device of one worker. `kind` is `cuda` or `cpu`; `memory_bytes` is the memory available to the worker."""

    name: str
    memory_bytes: int
    kind: str


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the device's peak FLOP/s for matrix products in `dtype`, or None if unknown or for a MIG partition."""
    if " MIG " in name:
        return None
    peak = next((peak for peak in PEAKS if re.search(peak.pattern, name)), None)
    teraflops = getattr(peak, str(dtype).removeprefix("torch."), None)
    return None if teraflops is None else teraflops * 1e12


def local_device(workers: int = 1) -> Device:
    """Return this machine's first CUDA device, else the CPU with the currently free memory divided by `workers`."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, "cuda")
    return Device("CPU", host_memory() // workers, "cpu")


def known_device(name: str) -> Device | None:
    """Return the accelerator of a name in `MEMORIES` (in any case), or None if there is no such entry."""
    folded = {known.lower(): known for known in MEMORIES}
    known = folded.get(name.lower())
    return None if known is None else Device(f"NVIDIA {known}", MEMORIES[known] << 30, "cuda")
