"""Environment variables that make the libraries quiet and stable, and disable their telemetry."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from tempfile import gettempdir

from finetune_api.report import NODE_VARIABLE

QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would start workers by `uv run` too, which may fail
    "RAY_raylet_start_wait_time_s": "180",  # the default of 30 s is too short for a busy machine
    "RAY_prestart_worker_first_driver": "0",  # otherwise one process per CPU, which our workers cannot use
    "RAY_worker_niceness": "0",  # Ray's default of 15 gives its workers less CPU time than other processes
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line of a worker appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # SIGTERM is enough, and the watcher is another process that loads Ray
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables from which torch 2.13 reads the settings of its allocator; the last two are older names."""


def node_name() -> str:
    """Return the name of this node: the Kubernetes node in a pod of the operator, or else the hostname."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def quiet_environment(accelerator: bool) -> dict[str, str]:
    """Return the environment variables of every process of a run.

    Args:
        accelerator: whether the run uses GPUs. If not, DeepSpeed must be kept from choosing CUDA where it is installed.
    """
    return QUIET_ENVIRONMENT | ({} if accelerator else {"DS_ACCELERATOR": "cpu"})


def allocator_environment(accelerator: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that makes torch's CUDA allocator use expandable segments, which reduce fragmentation.

    Otherwise rows of varying length fragment the memory, which then runs out with gigabytes reserved but unused.

    Args:
        accelerator: whether the run uses GPUs.
        environment: environment of the user. The result is empty if it configures the allocator, or if vLLM is
            installed, whose sleep mode does not support expandable segments (`CuMemAllocator`).
    """
    configured = any(name in environment for name in ALLOCATOR_VARIABLES)
    if not accelerator or configured or find_spec("vllm") is not None:
        return {}
    return {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


NCCL_LOG_LEVEL, NCCL_LOG_FILE = "NCCL_DEBUG", "NCCL_DEBUG_FILE"


def nccl_log_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make NCCL write the log of each process to a file (`%h`: host, `%p`: process id).

    Empty if the user has set NCCL_DEBUG.
    """
    if NCCL_LOG_LEVEL in environment:
        return {}
    path = os.path.join(gettempdir(), "finetune-nccl.%h.%p.log")
    return {NCCL_LOG_LEVEL: "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET", NCCL_LOG_FILE: path}


def apply_environment(variables: dict[str, str]) -> None:
    """Set the variables that the user has not set, and silence loggers that have no variable."""
    hush()
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def hush() -> None:
    """Silence bitsandbytes, which recommends a package with faster kernels whenever it is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
