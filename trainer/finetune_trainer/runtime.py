"""The process environment that makes the libraries quiet, steady and private."""

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
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would start each worker by `uv run` too, which may fail
    "RAY_raylet_start_wait_time_s": "180",  # the default 30 s is too short for a busy machine
    "RAY_prestart_worker_first_driver": "0",  # a process per CPU, which no worker of ours can take over
    "RAY_worker_niceness": "0",  # Ray runs its workers at 15, behind whatever else the machine does
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # SIGTERM tells us, and the watcher is a process that loads Ray
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
"""What torch 2.13 reads its allocator's settings from; the last two are its older names."""


def node_name() -> str:
    """Return the name of this node: Kubernetes' in a pod of the operator's, else the machine's own."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def quiet_environment(accelerator: bool) -> dict[str, str]:
    """Variables for every process of a run.

    Args:
        accelerator: whether the run uses GPUs; DeepSpeed otherwise picks one where it finds CUDA's libraries.
    """
    return QUIET_ENVIRONMENT | ({} if accelerator else {"DS_ACCELERATOR": "cpu"})


def allocator_environment(accelerator: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that makes torch's CUDA allocator use expandable segments, which fragment less.

    Rows of changing length otherwise leave gaps in it: memory that is reserved, and out of memory with gigabytes free.

    Args:
        accelerator: whether the run uses GPUs.
        environment: the user's. Nothing is added where it configures the allocator, or where vLLM is installed: its
            sleep mode refuses expandable segments (`CuMemAllocator`).
    """
    chosen = any(name in environment for name in ALLOCATOR_VARIABLES)
    if not accelerator or chosen or find_spec("vllm") is not None:
        return {}
    return {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}


NCCL_LOG_LEVEL, NCCL_LOG_FILE = "NCCL_DEBUG", "NCCL_DEBUG_FILE"


def nccl_log_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make NCCL write its log to a file for each process (`%h`: host, `%p`: process).

    Empty where the user has set NCCL_DEBUG.
    """
    if NCCL_LOG_LEVEL in environment:
        return {}
    path = os.path.join(gettempdir(), "finetune-nccl.%h.%p.log")
    return {NCCL_LOG_LEVEL: "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET", NCCL_LOG_FILE: path}


def apply_environment(variables: dict[str, str]) -> None:
    """Set what the user hasn't set, and hush what has no variable of its own."""
    hush()
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def hush() -> None:
    """At each import bitsandbytes advises a package that fetches faster kernels from the hub at run time."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
