"""Classification of error messages of CUDA, NCCL, Triton, torch and the NVIDIA driver.

The trainer classifies the exception of a worker, and the operator the termination message of a pod. Both use this
table, so that a failure has the same class and the same retry rule on each side.

Sources: the messages of `cudaGetErrorString` (CUDA Runtime API, `cudaError_t`), of c10/cuda and ProcessGroupNCCL in
torch 2.13, of NCCL 2.29 (`Cuda failure <code> '<message>'`), of `triton/runtime/build.py` and
`triton/backends/nvidia/driver.py` in Triton 3.7, and NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum


class Retry(Enum):
    """Change that another attempt needs in order to succeed."""

    NEVER = "a change of the job, its data or its image"
    MORE_MEMORY = "another batch, or more memory"
    AGAIN = "no change: the same attempt may succeed"
    ELSEWHERE = "another node"


class FaultKind(StrEnum):
    """Classes of device failures. The first class that matches a text wins: causes come before their effects."""

    GPU = "GPU fault"
    TOOLCHAIN = "C compiler missing"
    DRIVER = "NVIDIA driver not usable"
    ARCHITECTURE = "GPU not supported by this torch"
    DEVICE_ASSERT = "device-side assert"
    DEVICE_MEMORY = "GPU out of memory"
    SHARED_MEMORY = "/dev/shm full"
    PINNED_MEMORY = "locked memory limit too low"
    HOST_MEMORY = "host out of memory"
    ILLEGAL_ACCESS = "illegal memory access"
    NCCL_TIMEOUT = "NCCL timeout"
    NCCL_SYSTEM = "NCCL system error"


@dataclass(frozen=True)
class DeviceFault:
    """One class of failures: patterns, advice, and what a retry needs."""

    kind: FaultKind
    pattern: re.Pattern[str]
    """Pattern that matches within one line of the text."""
    retry: Retry
    advice: str
    """Advice, as one sentence without a final period. It must not match a pattern of this table."""


@dataclass(frozen=True)
class Found:
    """A device fault found in a text."""

    fault: DeviceFault
    line: str
    """The last line of the text that matches."""


def _fault(kind: FaultKind, retry: Retry, advice: str, *patterns: str) -> DeviceFault:
    return DeviceFault(kind, re.compile("|".join(patterns), re.IGNORECASE), retry, advice)


# Xid 8, 11, 13, 31, 43 and 45 are errors of the application (RESTART_APP in the catalog), 63 and 92 are notices; all
# others are errors of the GPU.
_XID = r"\bNVRM: Xid[^\n]*?\):\s*"
_APPLICATION_XID = rf"{_XID}(?:13|31)\b"
_HARDWARE_XID = rf"{_XID}(?!(?:8|11|13|31|43|45|63|92)\b)\d+"

DEVICE_FAULTS: tuple[DeviceFault, ...] = (
    _fault(
        FaultKind.GPU,
        Retry.ELSEWHERE,
        "A GPU of that node is broken: check `nvidia-smi -q -d ECC,ROW_REMAPPER` and `dmesg | grep Xid` there, "
        "then reset the GPU, reboot the node, or cordon it",
        r"GPU fault on node \S+",  # message of the trainer
        r"uncorrectable (?:ECC|NVLink) error",
        r"(?:contained|uncontained) (?:ECC|NVLink) error",
        r"double.bit ECC error",
        r"fallen off the bus",
        r"\bGPU is lost\b",
        r"CUDA error: hardware stack error",
        r"Cuda failure (?:214|220|714|721|802)\b",
        r"CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        r"CUDA error: system not yet initialized",
        r"CUDA-capable device\(s\) is/are busy or unavailable",
        r"\bSXid \(",
        _HARDWARE_XID,
    ),
    _fault(
        FaultKind.TOOLCHAIN,
        Retry.NEVER,
        "Triton compiles its kernel launcher at run time: install gcc, libc6-dev and Python's headers in the image, "
        "or use the project's trainer image; `finetune doctor` checks it",
        r"Failed to find C compiler",
        r"No working C\+\+ compiler found in",
        r"InvalidCxxCompiler",
        r"fatal error: Python\.h: No such file",
        r"fatal error: (?:stdio|stdlib|dlfcn|cuda)\.h: No such file",
        r"Command '\[[^\n]*(?:cuda_utils|__triton_launcher|launcher)\.c'[^\n]* returned non-zero exit status",
    ),
    _fault(
        FaultKind.DRIVER,
        Retry.NEVER,
        "Update the NVIDIA driver of the node, or use an image whose torch is built for an older CUDA; `finetune "
        "doctor` names the version that is needed",
        r"NVIDIA driver on your system is too old",
        r"Found no NVIDIA driver on your system",
        r"CUDA driver version is insufficient for CUDA runtime version",
        r"unsupported display driver / cuda driver combination",
        r"Torch not compiled with CUDA enabled",
        r"libcuda\.so cannot found",
        r"ProcessGroupNCCL is only supported with GPUs, no GPUs found",
    ),
    _fault(
        FaultKind.ARCHITECTURE,
        Retry.NEVER,
        "This torch does not support the compute capability of that GPU: choose other nodes (resources.podTemplate "
        "nodeSelector), or an image whose torch supports it",
        r"no kernel image is available for execution on the device",
        r"is not compatible with the current PyTorch installation",
        r"Cuda failure 209\b",
    ),
    _fault(
        FaultKind.DEVICE_ASSERT,
        Retry.NEVER,
        "A kernel found an index out of range, most often a token id or label beyond the model's vocabulary: "
        "compare the tokenizer with the model's vocab_size; CUDA_LAUNCH_BLOCKING=1 in the environment names the "
        "operation",
        r"device-side assert triggered",  # every CUDA error of torch ends with advice on "device-side assertions"
        r"block: \[\d+,\d+,\d+\], thread: \[\d+,\d+,\d+\] Assertion ",
        r"Cuda failure 710\b",
    ),
    _fault(
        FaultKind.DEVICE_MEMORY,
        Retry.MORE_MEMORY,
        "Lower perDeviceTrainBatchSize (and raise gradientAccumulationSteps by the same factor), set "
        "gradientCheckpointing, raise sharding.zero, or shorten maxLength or blockSize; `finetune plan` shows what "
        "uses the memory",
        r"(?:CUDA|HIP|XPU) out of memory",
        r"CUDA (?:driver )?error: out of memory",
        r"torch\.(?:cuda\.)?OutOfMemoryError",
        r"Cuda failure (?:2 )?'out of memory'",
        r"Triton Error \[CUDA\]: out of memory",
        r"(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED",
        r"cudaErrorMemoryAllocation",
        r"Failed to CUDA (?:host )?(?:calloc|malloc)",
    ),
    _fault(
        FaultKind.SHARED_MEMORY,
        Retry.MORE_MEMORY,
        "Raise kubernetes.sharedMemory (on one machine, the size of /dev/shm): NCCL and data loaders keep buffers "
        "there",
        r"shared memory segment /dev/shm/",
        r"/dev/shm/[^\n]*No space left on device",
        r"workers are out of shared memory",
        r"killed by signal: Bus error",
        r"unable to (?:write to|open) file </torch_",
    ),
    _fault(
        FaultKind.PINNED_MEMORY,
        Retry.NEVER,
        "RDMA needs locked memory: set LimitMEMLOCK=infinity on the node's containerd service (capability IPC_LOCK "
        "has no effect for a container that does not run as root), or NCCL_IB_DISABLE=1 to use TCP",
        r"\bibv_(?:reg_mr|create_cq|create_qp)\w*[^\n]*(?:Cannot allocate memory|ENOMEM|errno 12)",
    ),
    _fault(
        FaultKind.HOST_MEMORY,
        Retry.MORE_MEMORY,
        "Raise the host memory (resources.memoryPerNode): the operating system refused memory to the process",
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        r"std::bad_alloc",
        r"\[Errno 12\] Cannot allocate memory",
        r"unable to mmap \d+ bytes from file[^\n]*Cannot allocate memory",
        r"node running low on memory",
    ),
    _fault(
        FaultKind.ILLEGAL_ACCESS,
        Retry.AGAIN,
        "A kernel used an invalid address, because of a bug in the kernel or a fault of the GPU memory: if it repeats, "
        "set CUDA_LAUNCH_BLOCKING=1 to find the operation, and model.attnImplementation to sdpa to avoid extra kernels",
        r"an illegal memory access was encountered",
        r"an illegal instruction was encountered",
        r"CUDA error: misaligned address",
        r"CUDA error: unspecified launch failure",
        r"Cuda failure (?:700|715|716|719)\b",
        _APPLICATION_XID,
    ),
    _fault(
        FaultKind.NCCL_TIMEOUT,
        Retry.AGAIN,
        "A worker did not reach a collective operation in time: it died, hung, or was slower than the others "
        "(loading, tokenizing, evaluation); read the log of the worker that the message does NOT name",
        r"Watchdog caught collective operation timeout",
        r"WorkNCCL\([^\n]*before timing out",
        r"watchdog got stuck for",
        r"DistBackendError: [^\n]*wait timeout",
    ),
    _fault(
        FaultKind.NCCL_SYSTEM,
        Retry.AGAIN,
        "NCCL lost a connection or could not get a resource: NCCL_DEBUG=INFO in the environment shows which; "
        "NCCL_SOCKET_IFNAME chooses the network interface, `finetune doctor` checks /dev/shm, locked memory and "
        "RDMA devices",
        r"unhandled system error",
        r"\bnccl(?:System|Remote)Error\b",
        r"NCCL WARN[^\n]*(?:Connection (?:refused|closed|reset)|No route to host)",
    ),
)  # fmt: skip
BY_KIND = {fault.kind: fault for fault in DEVICE_FAULTS}


def device_fault(text: str) -> Found | None:
    """Return the device fault that explains a text best, or None if the text contains none.

    A text may contain the messages of several workers. The order of `FaultKind` decides, not the order of the lines: an
    ECC error of one worker explains the broken connections of the others.
    """
    return next(_found(text), None)


def _found(text: str) -> Iterator[Found]:
    lines = text.splitlines()
    for fault in DEVICE_FAULTS:
        line = next((line for line in reversed(lines) if fault.pattern.search(line)), None)
        if line is not None:
            yield Found(fault, line.strip())
