"""Connects to the Ray cluster of a job: a new one on this machine, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future, wait
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from finetune_trainer.forks.start import patch_ray
from finetune_trainer.plan.workers import Workers
from finetune_trainer.runtime import allocator_environment, quiet_environment


def start_ray(workers: Workers, temp_dir: Path | None = None, variables: dict[str, str] | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine.

    Args:
        workers: the planned workers of the job.
        temp_dir: directory for Ray's session files. Default: Ray's own.
        variables: additional environment variables of the workers.
    """
    import ray

    patch_ray()
    env = quiet_environment(workers.accelerator) | allocator_environment(workers.accelerator, os.environ)
    runtime = {"env_vars": env | (variables or {}) | {"OMP_NUM_THREADS": str(workers.cpus)}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=runtime, logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",  # never connect to another cluster on this machine
        num_cpus=max(psutil.cpu_count() or 1, workers.most * workers.cpus + 1),
        include_dashboard=False,
        runtime_env=runtime,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        _temp_dir=str(temp_dir) if temp_dir else None,
    )


def keep_signal_handlers() -> None:
    """Restore this process's Python signal handlers. Ray installs a native one that aborts the process on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


def stop_ray(started: Future[None]) -> None:
    """Disconnect from the cluster, and stop it if `start_ray` has started it.

    Args:
        started: the call of `start_ray`, which may not have returned yet.
    """
    import ray

    wait([started])
    ray.shutdown()
