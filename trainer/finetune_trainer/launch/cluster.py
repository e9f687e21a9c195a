"""The Ray cluster a job runs on: one started here, or the one the environment names."""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetune_api.cluster import Resources
from finetune_api.slots import workers_per_node
from finetune_trainer.forks.start import lean
from finetune_trainer.launch.threads import threads_per_worker
from finetune_trainer.runtime import allocator_environment, quiet_environment


@dataclass(frozen=True)
class Workers:
    """How many Ray Train workers a job has and what each gets."""

    least: int
    most: int
    accelerator: bool
    cpus: int
    """Threads per worker."""

    @property
    def elastic(self) -> bool:
        return self.least != self.most


def plan_workers(resources: Resources) -> Workers:
    """The workers a job asks for, on this machine where it leaves the question open."""
    gpus = resources.gpus_per_node if resources.gpus_per_node is not None else _gpus()
    per_node = workers_per_node(resources, gpus)
    nodes = resources.nodes or 1
    least, most = (resources.min_nodes or nodes) * per_node, (resources.max_nodes or nodes) * per_node
    return Workers(least, most, gpus > 0, threads_per_worker(resources, _sharers(per_node, most)))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def start_ray(workers: Workers, temp_dir: Path | None = None, variables: dict[str, str] | None = None) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine.

    Args:
        variables: of the workers' environment, in addition to those that every process has.
    """
    import ray

    lean()
    env = quiet_environment(workers.accelerator) | allocator_environment(workers.accelerator, os.environ)
    runtime = {"env_vars": env | (variables or {}) | {"OMP_NUM_THREADS": str(workers.cpus)}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=runtime, logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",  # never one that somebody else started on this machine
        num_cpus=max(psutil.cpu_count() or 1, workers.most * workers.cpus + 1),
        include_dashboard=False,
        runtime_env=runtime,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        _temp_dir=str(temp_dir) if temp_dir else None,
    )


def keep_signal_handlers() -> None:
    """Put this process's own handlers back: Ray's native one, set at start-up, aborts the process on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.getsignal(number))


def stop_ray(started: Future[None]) -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    wait([started])
    ray.shutdown()


def _sharers(per_node: int, most: int) -> int:
    """Workers that share a machine's CPUs: a node's, or all of them where every node is this machine."""
    return per_node if os.environ.get("RAY_ADDRESS") else most
