"""Error texts of GPU jobs, in the formats in which CUDA, NCCL, Triton, torch and Linux write them, and their classes.

`tests/api` checks them against the shared table, `tests/jobs` against the driver's retries, `tests/operator` against
the status.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.device_faults import FaultKind

ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
"""Text that torch adds to each CUDA error; it mentions device-side assertions for any error."""
_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
_NCCL_VERSION = " (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.7\n"


@dataclass(frozen=True)
class DeviceText:
    """One error text. `error` is the class that raises it, by its name in torch, subprocess or builtins."""

    name: str
    error: str
    text: str
    kind: FaultKind | None
    advises: str = ""
    """Words that the advice must contain."""


def _oom(wanted: str) -> str:
    return (
        f"CUDA out of memory. Tried to allocate {wanted}. GPU 0 has a total capacity of 79.10 GiB of which 1.93 GiB "
        "is free. Process 71 has 77.15 GiB memory in use. Of the allocated memory 70.02 GiB is allocated by "
        "PyTorch."
    )


TEXTS = (
    DeviceText("an ECC error", "AcceleratorError", f"CUDA error: uncorrectable ECC error encountered{ASYNC}",
               FaultKind.GPU, "nvidia-smi"),
    DeviceText("an NVLink error", "AcceleratorError",
               f"CUDA error: uncorrectable NVLink error detected during the execution{ASYNC}", FaultKind.GPU, "cordon"),
    DeviceText("an ECC error that NCCL met", "DistBackendError",
               f"{_NCCL}unhandled cuda error{_NCCL_VERSION}ncclUnhandledCudaError: Call to CUDA function failed.\n"
               "Last error:\nCuda failure 214 'uncorrectable ECC error encountered'", FaultKind.GPU, "dmesg"),
    DeviceText("a GPU that has gone", "RuntimeError",
               "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
               FaultKind.GPU, "reboot"),
    DeviceText("a double bit error in the kernel's log", "RuntimeError",
               "[ 1382.11] NVRM: Xid (PCI:0000:86:00): 48, pid=1101, name=python, An uncorrectable double bit error "
               "(DBE) "
               "has been detected on GPU in the framebuffer at partition 2", FaultKind.GPU, "reset"),
    DeviceText("a GPU that another process holds", "AcceleratorError",
               f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{ASYNC}", FaultKind.GPU, "cordon"),
    DeviceText("a fabric manager that does not run", "RuntimeError",
               "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
               "NumCudaDevices() "
               "that might have already set an error? Error 802: CUDA error: system not yet initialized",
               FaultKind.GPU),
    DeviceText("no compiler", "RuntimeError", "Failed to find C compiler. Please specify via CC environment variable "
               "or set "
               "triton.knobs.build.impl.", FaultKind.TOOLCHAIN, "gcc"),
    DeviceText("no headers", "CalledProcessError",
               "Command '['/usr/bin/gcc', '/tmp/tmpx1/cuda_utils.c', '-O3', '-shared', '-fPIC', '-Wno-psabi', '-o', "
               "'/tmp/tmpx1/cuda_utils.cpython-312-x86_64-linux-gnu.so', '-l:libcuda.so.1']' returned non-zero exit "
               "status 1.",
               FaultKind.TOOLCHAIN, "headers"),
    DeviceText("an old driver", "RuntimeError",
               "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
               "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
               FaultKind.DRIVER, "Update"),
    DeviceText("no driver", "ValueError", "ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
               FaultKind.DRIVER, "driver"),
    DeviceText("a torch without CUDA", "AssertionError", "Torch not compiled with CUDA enabled",
               FaultKind.DRIVER, "image"),
    DeviceText("a GPU that is too old", "AcceleratorError",
               f"CUDA error: no kernel image is available for execution on the device{ASYNC}", FaultKind.ARCHITECTURE,
               "nodeSelector"),
    DeviceText("an index out of range", "AcceleratorError", f"CUDA error: device-side assert triggered{ASYNC}",
               FaultKind.DEVICE_ASSERT, "vocab_size"),
    DeviceText("an index out of range that Triton met", "RuntimeError",
               "Triton Error [CUDA]: device-side assert triggered", FaultKind.DEVICE_ASSERT, "CUDA_LAUNCH_BLOCKING"),
    DeviceText("torch's allocator", "OutOfMemoryError", _oom("20.00 GiB"), FaultKind.DEVICE_MEMORY,
               "perDeviceTrainBatchSize"),
    DeviceText("the driver's memory", "AcceleratorError", f"CUDA error: out of memory{ASYNC}", FaultKind.DEVICE_MEMORY,
               "gradientCheckpointing"),
    DeviceText("NCCL's buffers", "DistBackendError",
               f"{_NCCL}unhandled cuda error{_NCCL_VERSION}ncclUnhandledCudaError: Call to CUDA function failed.\n"
               "Last error:\nCuda failure 2 'out of memory'", FaultKind.DEVICE_MEMORY, "sharding.zero"),
    DeviceText("cuBLAS's workspace", "RuntimeError",
               "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", FaultKind.DEVICE_MEMORY,
               "maxLength"),
    DeviceText("an illegal access", "AcceleratorError", f"CUDA error: an illegal memory access was encountered{ASYNC}",
               FaultKind.ILLEGAL_ACCESS, "CUDA_LAUNCH_BLOCKING"),
    DeviceText("an illegal access in the kernel's log", "RuntimeError",
               "NVRM: Xid (PCI:0000:c1:00): 31, pid=71, name=python, Ch 00000008, intr 00000000. MMU Fault: ENGINE "
               "GRAPHICS",
               FaultKind.ILLEGAL_ACCESS),
    DeviceText("a process that was killed, in the kernel's log", "RuntimeError",
               "NVRM: Xid (PCI:0000:c1:00): 45, pid=71, name=python, Ch 00000010", None),
    DeviceText("a small /dev/shm", "DistBackendError",
               f"{_NCCL}unhandled system error{_NCCL_VERSION}ncclSystemError: System call (e.g. socket, malloc) or "
               "external library call failed or device error.\nLast error:\nError while creating shared memory "
               "segment "
               "/dev/shm/nccl-Xk3fQa (size 9637888), error: No space left on device (28)", FaultKind.SHARED_MEMORY,
               "sharedMemory"),
    DeviceText("a data loader without /dev/shm", "RuntimeError",
               "DataLoader worker (pid 311) is killed by signal: Bus error. It is possible that dataloader's "
               "workers are out "
               "of shared memory. Please try to raise your shared memory limit.",
               FaultKind.SHARED_MEMORY, "sharedMemory"),
    DeviceText("a limit on locked memory", "DistBackendError",
               f"{_NCCL}unhandled system error{_NCCL_VERSION}ncclSystemError: System call (e.g. socket, malloc) or "
               "external library call failed or device error.\nLast error:\nCall to ibv_reg_mr_iova2 failed with "
               "error Cannot allocate "
               "memory", FaultKind.PINNED_MEMORY, "LimitMEMLOCK"),
    DeviceText("the host's allocator", "RuntimeError",
               "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
               "to allocate "
               "21474836480 bytes. Error code 12 (Cannot allocate memory)", FaultKind.HOST_MEMORY, "memoryPerNode"),
    DeviceText("a fork without memory", "OSError", "[Errno 12] Cannot allocate memory",
               FaultKind.HOST_MEMORY, "memoryPerNode"),
    DeviceText("the watchdog", "DistBackendError",
               "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, "
               "NumelIn=466, "
               "NumelOut=466, Timeout(ms)=1800000) ran for 1800060 milliseconds before timing out.",
               FaultKind.NCCL_TIMEOUT, "log of the worker"),
    DeviceText("a connection that NCCL lost", "DistBackendError",
               f"{_NCCL}unhandled system error{_NCCL_VERSION}ncclSystemError: System call (e.g. socket, malloc) or "
               "external library call failed or device error.\nLast error:\nsocketProgress: Connection closed by "
               "remote peer",
               FaultKind.NCCL_SYSTEM, "NCCL_DEBUG"),
    DeviceText("a remote process that ended", "DistBackendError",
               f"{_NCCL}remote process exited or there was a network error, NCCL version 2.29.7\nncclRemoteError: A "
               "call failed "
               "possibly due to a network error or a remote process exiting prematurely.", FaultKind.NCCL_SYSTEM),
    DeviceText("an error that says nothing of devices", "RuntimeError",
               "The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 1", None),
)  # fmt: skip
