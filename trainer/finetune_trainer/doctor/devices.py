"""Checks of the driver, the GPUs and torch's support for them. Pure."""

from __future__ import annotations

import re

from finetune_api.device_faults import FaultKind, device_fault
from finetune_trainer.doctor.facts import Facts, Gpu, Torch
from finetune_trainer.doctor.finding import Finding, Scope, State
from finetune_trainer.doctor.needs import Needs

DRIVERS = {"11": "450", "12": "525", "13": "580"}
"""The oldest driver for each major version of CUDA, which runs builds for any of its minor versions.

Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility", table 1
(docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
"""
DRIVER, GPUS, CUDA, ARCHITECTURE = "NVIDIA driver", "GPUs", "CUDA", "GPU architecture"
NATIVE_BF16 = (8, 0)
"""Lowest compute capability of GPUs with bfloat16 units (Ampere). torch emulates bfloat16 on older ones."""
_FOUND_VERSION = re.compile(r"found version (\d+)")
"""Matches torch's error for a driver that is too old. The number is a CUDA version, such as 12040 for 12.4."""
_SETUP_FAULTS = (FaultKind.DRIVER, FaultKind.ARCHITECTURE)
_ARCHITECTURE = re.compile(r"^(sm|compute)_(\d+)(\d)[af]?$")


def least_driver(cuda: str | None) -> str | None:
    """Return the oldest driver that runs builds for a CUDA version, or None if the table has no such version."""
    return DRIVERS.get((cuda or "").partition(".")[0])


def torch_build(facts: Facts, needs: Needs) -> Finding:
    """Check that torch is built for CUDA, and not the build for CPUs of PyTorch's CPU index."""
    torch, name = facts.torch, "torch with CUDA"
    found = f"torch {torch.version}" + (f", built for CUDA {torch.cuda}" if torch.cuda else ", built without CUDA")
    if torch.version is None:
        found = "no torch"
    if not needs.gpus:
        return Finding(name, State.NOT_NEEDED, found, "training on GPUs", scope=Scope.IMAGE)
    if torch.cuda:
        return Finding(name, State.OK, found, "a torch built for CUDA", scope=Scope.IMAGE)
    remedy = "Install torch from PyPI or from PyTorch's CUDA index, not from its CPU index"
    return Finding(name, State.MISSING, found, "a torch built for CUDA", remedy, scope=Scope.IMAGE)


def driver(facts: Facts, needs: Needs) -> Finding:
    """Check the driver's version against torch's CUDA. An older driver is enough if CUDA works with it."""
    name, version, least = DRIVER, facts.driver.version, least_driver(facts.torch.cuda)
    needed = f"{f'{least} or newer' if least else 'a driver'} for torch's CUDA {facts.torch.cuda or ''}".rstrip()
    if not needs.gpus:
        return Finding(name, State.NOT_NEEDED, version or "none", "training on GPUs")
    if version is None and not facts.torch.gpus:
        return Finding(name, State.MISSING, _without_version(facts), needed, _driver_remedy(least))
    old = version is not None and least is not None and int(version.partition(".")[0]) < int(least)
    if not old:
        return Finding(name, State.OK, version or "unknown version", needed)
    if facts.torch.gpus:
        return Finding(name, State.OK, f"{version}, with CUDA {facts.torch.cuda} by forward compatibility", needed)
    return Finding(name, State.MISSING, f"{version}", needed, _driver_remedy(least))


def _without_version(facts: Facts) -> str:
    """Describe a driver whose version the kernel does not show, by the CUDA version in torch's error."""
    match = _FOUND_VERSION.search(facts.torch.error)
    if match:
        thousands, rest = divmod(int(match[1]), 1000)
        return f"one for CUDA {thousands}.{rest // 10}"
    return "none" + (f", {facts.driver.on_bus} NVIDIA devices on the PCI bus" if facts.driver.on_bus else "")


def _driver_remedy(least: str | None) -> str:
    which = f"NVIDIA driver {least} or newer" if least else "the NVIDIA driver"
    return f"Install {which} on the node, use an image with a torch for an older CUDA, or set gpusPerNode to 0 (CPUs)"


def gpus(facts: Facts, needs: Needs) -> Finding:
    """Check that the node has as many GPUs as the job uses on it."""
    usable, files = facts.torch.gpus, facts.driver.devices
    found = _names(usable) if usable else f"{files} device files /dev/nvidia*" if files else "no GPU"
    if not needs.gpus:
        return Finding(GPUS, State.NOT_NEEDED, found, "training on GPUs")
    needed = f"{needs.gpus} per node"
    count = len(usable) or files
    if count >= needs.gpus:
        return Finding(GPUS, State.OK, found, needed)
    remedy = "Set resources.gpusPerNode to the GPUs of a node, choose other nodes, or install NVIDIA's device plugin"
    return Finding(GPUS, State.MISSING, found, needed, remedy, device=count > 0)


def _names(usable: tuple[Gpu, ...]) -> str:
    counts: dict[str, int] = {}
    for gpu in usable:
        name = f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def cuda(facts: Facts, needs: Needs) -> Finding:
    """Check that torch can run a kernel on each GPU."""
    torch, name, needed = facts.torch, CUDA, "a kernel that runs on each GPU"
    if not needs.gpus:
        return Finding(name, State.NOT_NEEDED, "no GPU" if torch.error else "usable", "training on GPUs")
    if torch.gpus and not torch.error:
        return Finding(name, State.OK, f"CUDA {torch.cuda} usable", needed)
    fault = device_fault(torch.error)
    wrong_setup = fault is not None and fault.fault.kind in _SETUP_FAULTS
    device = not wrong_setup and driver(facts, needs).state is State.OK and facts.driver.devices > 0
    remedy = (
        "Check `nvidia-smi` and `dmesg | grep -e NVRM -e Xid` on the node" if device else "Install the driver first"
    )
    return Finding(name, State.MISSING, torch.error or "not usable", needed, remedy, device=device)


def architecture(facts: Facts, needs: Needs) -> Finding:
    """Check that torch has code for the GPUs: binary code of the same major version, or PTX of an older one."""
    torch, name = facts.torch, ARCHITECTURE
    needed = f"one of {' '.join(torch.architectures) or 'those of torch'}"
    if not needs.gpus or not torch.gpus:
        return Finding(name, State.NOT_NEEDED, "no GPU", needed)
    unsupported = sorted({gpu.name for gpu in torch.gpus if not _has_code_for(gpu.capability, torch)})
    found = ", ".join(sorted({f"{gpu.name} sm_{gpu.capability[0]}{gpu.capability[1]}" for gpu in torch.gpus}))
    if not unsupported:
        return Finding(name, State.OK, found, needed)
    remedy = f"Choose nodes without {', '.join(unsupported)}, or an image whose torch supports them"
    return Finding(name, State.MISSING, found, needed, remedy)


def _has_code_for(capability: tuple[int, int], torch: Torch) -> bool:
    """Whether torch has code for a compute capability.

    Binary code runs on GPUs of the same major version and at least its minor version; PTX runs on all later GPUs.
    """
    if not torch.architectures:
        return True
    for kind, major, minor in (match.groups() for match in map(_ARCHITECTURE.match, torch.architectures) if match):
        built = int(major), int(minor)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def bfloat16(facts: Facts, needs: Needs) -> Finding:
    """Check for bfloat16 in hardware. `torch.cuda.is_bf16_supported()` is also true if torch emulates it."""
    name, needed = "bfloat16", "compute capability 8.0 or newer (Ampere)"
    if not needs.gpus or not facts.torch.gpus or needs.dtype in ("float16", "float32"):
        return Finding(name, State.NOT_NEEDED, "no GPU" if not facts.torch.gpus else "not used", needed)
    old = sorted({gpu.name for gpu in facts.torch.gpus if gpu.capability < NATIVE_BF16})
    if not old:
        return Finding(name, State.OK, "native", needed)
    remedy = "Set model.dtype to float16, or choose newer GPUs"
    return Finding(name, State.WARNING, f"emulated on {', '.join(old)}", needed, remedy, "model.dtype")


def nccl(facts: Facts, needs: Needs) -> Finding:
    """Check for NCCL, which is part of torch."""
    workers, version = needs.gpus * needs.nodes, facts.torch.nccl
    if workers < 2:
        return Finding("NCCL", State.NOT_NEEDED, version or "none", "more than one GPU")
    if version:
        return Finding("NCCL", State.OK, version, "NCCL of torch")
    return Finding("NCCL", State.MISSING, "none", "NCCL of torch", "Install a torch built for CUDA on Linux")
