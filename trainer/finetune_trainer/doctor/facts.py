"""What the doctor knows of a machine: plain values, gathered by `gather` or written by a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Toolchain:
    """What Triton needs in order to compile its kernel launcher."""

    triton: str | None = None
    """Version of Triton; None where it is not installed."""
    compiler: str | None = None
    """Path of the compiler that Triton takes: `CC`, else gcc, else clang."""
    error: str = ""
    """Why Triton's launcher does not compile; empty where it does."""
    libcuda_error: str = ""
    """Why Triton does not find the driver's libcuda.so.1; empty where it does."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA sees."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    memory_bytes: int


@dataclass(frozen=True)
class Torch:
    """The installed torch, and what its CUDA said."""

    version: str | None = None
    cuda: str | None = None
    """CUDA that torch was built with, such as `13.0`; None for a build without CUDA."""
    architectures: tuple[str, ...] = ()
    """What torch has code for: `sm_90` (binary), `compute_90` (PTX)."""
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str = ""
    """Why CUDA can't be used, or a kernel does not run on a GPU, in torch's words; empty where all is well."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA kernel driver."""

    version: str | None = None
    open_module: bool = False
    """Whether it is the open kernel module, which can register GPU memory for RDMA by DMA-BUF."""
    devices: int = 0
    """Device files `/dev/nvidia<n>`."""
    on_bus: int = 0
    """NVIDIA display and compute devices on the PCI bus, with or without a driver."""


@dataclass(frozen=True)
class Package:
    """An optional package. `error`: why its import fails; empty where it was imported or not tried."""

    version: str
    error: str = ""


@dataclass(frozen=True)
class Host:
    """Limits of the machine or container. None: not known here."""

    shm_bytes: int | None = None
    open_files: int | None = None
    memory_bytes: int | None = None
    """Memory that this process may still use, by the machine and by its cgroups."""
    cache: str = ""
    """Directory of prepared data and downloads."""
    cache_free_bytes: int | None = None


@dataclass(frozen=True)
class Fabric:
    """What RDMA between nodes needs."""

    devices: tuple[str, ...] = ()
    """Verbs devices in this container: `/dev/infiniband/uverbs<n>`."""
    adapters: tuple[str, ...] = ()
    """Adapters of the machine: `/sys/class/infiniband`."""
    locked_bytes: int | None = None
    """RLIMIT_MEMLOCK; None where it is unlimited."""
    ipc_lock: bool = False
    """Whether CAP_IPC_LOCK is effective in this process."""
    peer_memory: bool = False
    """Whether the kernel module nvidia-peermem is loaded."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub. `error`: why it was not reached; empty where it was, or was not asked."""

    endpoint: str = "https://huggingface.co"
    offline: bool = False
    asked: bool = False
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """All that was found."""

    toolchain: Toolchain = Toolchain()
    torch: Torch = Torch()
    driver: Driver = Driver()
    packages: Mapping[str, Package] = field(default_factory=dict)
    """Optional packages that are installed, by their import name."""
    bitsandbytes_cudas: tuple[str, ...] = ()
    """CUDA versions that bitsandbytes has a library for, such as `130`."""
    host: Host = Host()
    fabric: Fabric = Fabric()
    hub: Hub = Hub()
