"""Reads the facts of this machine, without changing it or evaluating them."""

from __future__ import annotations

import os
import re
import resource
import runpy
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune_trainer.doctor.facts import Driver, Fabric, Facts, Gpu, Host, Hub, Package, Toolchain, Torch
from finetune_trainer.doctor.libraries import KERNELS
from finetune_trainer.doctor.programs import LAUNCHER, TORCH, run_program
from finetune_trainer.host_memory import host_memory

PACKAGES = ("bitsandbytes", "vllm", *KERNELS.values())
HUB_SECONDS = 5.0
NVIDIA, DISPLAY = "0x10de", "0x03"
"""PCI vendor of NVIDIA, and the PCI class of display and 3D controllers."""
IPC_LOCK_BIT = 14
"""CAP_IPC_LOCK of linux/capability.h."""
_DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)")
_LIBRARY = re.compile(r"libbitsandbytes_cuda(\d+)\.")


def gather(cache: Path, *, ask_hub: bool) -> Facts:
    """Return the facts of this machine. It takes some seconds, because it imports torch and compiles a C file.

    Args:
        cache: directory of prepared data and downloads.
        ask_hub: whether to send a request to the Hugging Face hub.
    """
    with ThreadPoolExecutor(3) as pool:
        launcher = pool.submit(run_program, LAUNCHER)
        probe = pool.submit(run_program, TORCH, *(name for name in KERNELS.values() if find_spec(name)))
        hub = pool.submit(hub_facts) if ask_hub else None
        host, packages = host_facts(cache), package_facts()
        imported = {
            name: Package(packages[name].version, error) for name, error in probe.result().get("imports", {}).items()
        }
        return Facts(
            toolchain=_toolchain(launcher.result()),
            torch=_torch(probe.result()),
            driver=driver_facts(),
            packages={**packages, **imported},
            bitsandbytes_cudas=bitsandbytes_cudas(),
            host=host,
            fabric=fabric_facts(),
            hub=hub.result() if hub else Hub(),
        )


def gather_image() -> Facts:
    """Return only the facts of the image: its packages and its compiler."""
    return Facts(
        toolchain=_toolchain(run_program(LAUNCHER)),
        torch=_torch({}),
        packages=package_facts(),
        bitsandbytes_cudas=bitsandbytes_cudas(),
    )


def _toolchain(answer: dict[str, Any]) -> Toolchain:
    errors = (answer.get("error") or "", answer.get("libcuda_error") or "")
    return Toolchain(answer.get("triton"), answer.get("compiler"), *errors)


def _torch(answer: dict[str, Any]) -> Torch:
    """Return the facts of torch. Its version is read from a file, so that it is known even if the import fails."""
    found = find_spec("torch")
    built = runpy.run_path(str(Path(found.origin).with_name("version.py"))) if found and found.origin else {}
    gpus = [Gpu(gpu["name"], tuple(gpu["capability"]), gpu["memory"]) for gpu in answer.get("gpus", [])]
    return Torch(
        version=built.get("__version__"),
        cuda=built.get("cuda"),
        architectures=tuple(answer.get("architectures", ())),
        nccl=answer.get("nccl"),
        gpus=tuple(gpus),
        error=answer.get("error", ""),
    )


def package_facts() -> dict[str, Package]:
    """Return the optional packages that are installed, without importing them."""
    return {name: Package(_version(name)) for name in PACKAGES if find_spec(name) is not None}


def _version(name: str) -> str:
    for distribution in (name, name.replace("_", "-"), "flash-attn-3"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def bitsandbytes_cudas() -> tuple[str, ...]:
    """Return the CUDA versions of bitsandbytes' libraries, without importing it, which would open the GPUs."""
    found = find_spec("bitsandbytes")
    folder = Path(found.origin).parent if found and found.origin else None
    names = [path.name for path in folder.iterdir()] if folder else []
    return tuple(sorted(match[1] for match in map(_LIBRARY.match, names) if match))


def driver_facts(root: Path = Path("/")) -> Driver:
    """Return the facts of NVIDIA's driver and devices.

    Args:
        root: root of the file system with /proc, /sys and /dev.
    """
    text = _read(root / "proc/driver/nvidia/version")
    match = _DRIVER.search(text)
    devices = [path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    bus = (root / "sys/bus/pci/devices").glob("*")
    on_bus = [
        path for path in bus if _read(path / "vendor").strip() == NVIDIA and _read(path / "class").startswith(DISPLAY)
    ]
    return Driver(match[1] if match else None, "Open Kernel Module" in text, len(devices), len(on_bus))


def fabric_facts(root: Path = Path("/")) -> Fabric:
    """Return the facts of RDMA.

    Args:
        root: root of the file system with /proc, /sys and /dev.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    effective = next((line for line in _read(root / "proc/self/status").splitlines() if line.startswith("CapEff:")), "")
    capabilities = int(effective.partition(":")[2].strip() or "0", 16)
    return Fabric(
        devices=tuple(sorted(path.name for path in (root / "dev/infiniband").glob("uverbs*"))),
        adapters=tuple(sorted(path.name for path in (root / "sys/class/infiniband").glob("*"))),
        locked_bytes=None if soft == resource.RLIM_INFINITY else soft,
        ipc_lock=bool(capabilities >> IPC_LOCK_BIT & 1),
        peer_memory=(root / "sys/module/nvidia_peermem").exists(),
    )


def host_facts(cache: Path) -> Host:
    """Return the limits of this machine and of this container."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    nearest = next(parent for parent in (cache, *cache.parents) if parent.exists())
    return Host(_size_of_shm(), files, host_memory(), str(cache), shutil.disk_usage(nearest).free)


def _size_of_shm() -> int | None:
    try:
        volume = os.statvfs("/dev/shm")
    except OSError:
        return None
    return volume.f_blocks * volume.f_frsize


def hub_facts() -> Hub:
    """Return whether the hub responds, unless HF_HUB_OFFLINE is set. An HTTP error is a response."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Hub(constants.ENDPOINT, offline=True)
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return Hub(constants.ENDPOINT, asked=True)
    except (OSError, ValueError) as error:
        return Hub(constants.ENDPOINT, asked=True, error=f"{constants.ENDPOINT} does not answer: {error}"[:300])
    return Hub(constants.ENDPOINT, asked=True)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
