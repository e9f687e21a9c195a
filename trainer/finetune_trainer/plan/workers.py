"""Plan the number of Ray Train workers of a job, and their CPU threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from finetune_api.cluster import Resources
from finetune_api.slots import workers_per_node
from finetune_trainer.plan.threads import threads_per_worker


@dataclass(frozen=True)
class Workers:
    """Number of Ray Train workers of a job, and the resources of each."""

    least: int
    most: int
    accelerator: bool
    cpus: int
    """Threads per worker."""

    @property
    def elastic(self) -> bool:
        return self.least != self.most


def plan_workers(resources: Resources) -> Workers:
    """Return the workers that a job requests; without `gpusPerNode`, count this machine's GPUs."""
    gpus = resources.gpus_per_node if resources.gpus_per_node is not None else _gpus()
    per_node = workers_per_node(resources, gpus)
    nodes = resources.nodes or 1
    least, most = (resources.min_nodes or nodes) * per_node, (resources.max_nodes or nodes) * per_node
    return Workers(least, most, gpus > 0, threads_per_worker(resources, _sharers(per_node, most)))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _sharers(per_node: int, most: int) -> int:
    """Return the number of workers that share a machine's CPUs: all workers if Ray runs on this machine only."""
    return per_node if os.environ.get("RAY_ADDRESS") else most
