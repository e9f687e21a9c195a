"""Facts of a machine as plain values, which `gather` reads or a test provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Toolchain:
    """The requirements of Triton to compile its kernel launcher."""

    triton: str | None = None
    """Version of Triton; None if it is not installed."""
    compiler: str | None = None
    """Path of the compiler that Triton uses: `CC`, or else gcc, or else clang."""
    error: str = ""
    """Why Triton's launcher does not compile; empty if it does."""
    libcuda_error: str = ""
    """Why Triton does not find the driver's libcuda.so.1; empty if it does."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that is visible to CUDA."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    memory_bytes: int


@dataclass(frozen=True)
class Torch:
    """The installed torch and its CUDA."""

    version: str | None = None
    cuda: str | None = None
    """CUDA version of the build, such as `13.0`; None for a build without CUDA."""
    architectures: tuple[str, ...] = ()
    """Architectures for which torch has code: `sm_90` (binary), `compute_90` (PTX)."""
    nccl: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str = ""
    """torch's error if CUDA can't be used or a kernel does not run on a GPU; empty if all work."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA kernel driver."""

    version: str | None = None
    open_module: bool = False
    """Whether it is the open kernel module, which can register GPU memory for RDMA by DMA-BUF."""
    devices: int = 0
    """Number of device files `/dev/nvidia<n>`."""
    on_bus: int = 0
    """Number of NVIDIA display and compute devices on the PCI bus, with or without a driver."""


@dataclass(frozen=True)
class Package:
    """An optional package."""

    version: str
    error: str = ""
    """Why its import fails; empty if it succeeds or was not tried."""


@dataclass(frozen=True)
class Host:
    """Limits of the machine or container. None means unknown."""

    shm_bytes: int | None = None
    open_files: int | None = None
    memory_bytes: int | None = None
    """Memory available to this process, limited by the machine and its cgroups."""
    cache: str = ""
    """Directory of prepared data and downloads."""
    cache_free_bytes: int | None = None


@dataclass(frozen=True)
class Fabric:
    """The requirements of RDMA between nodes."""

    devices: tuple[str, ...] = ()
    """Verbs devices in this container: `/dev/infiniband/uverbs<n>`."""
    adapters: tuple[str, ...] = ()
    """Adapters of the machine: `/sys/class/infiniband`."""
    locked_bytes: int | None = None
    """RLIMIT_MEMLOCK; None if it is unlimited."""
    ipc_lock: bool = False
    """Whether CAP_IPC_LOCK is effective in this process."""
    peer_memory: bool = False
    """Whether the kernel module nvidia-peermem is loaded."""


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub."""

    endpoint: str = "https://huggingface.co"
    offline: bool = False
    """Whether HF_HUB_OFFLINE is set."""
    asked: bool = False
    """Whether a request was sent."""
    error: str = ""
    """Why the request failed; empty if it succeeded or was not sent."""


@dataclass(frozen=True)
class Facts:
    """All facts of a machine."""

    toolchain: Toolchain = Toolchain()
    torch: Torch = Torch()
    driver: Driver = Driver()
    packages: Mapping[str, Package] = field(default_factory=dict)
    """Optional packages that are installed, by their import name."""
    bitsandbytes_cudas: tuple[str, ...] = ()
    """CUDA versions for which bitsandbytes has a library, such as `130`."""
    host: Host = Host()
    fabric: Fabric = Fabric()
    hub: Hub = Hub()
