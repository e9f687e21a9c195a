"""Number of CPU threads per worker."""

from __future__ import annotations

import os

from finetune_api.cluster import Resources
from finetune_api.slots import workers_per_node
from finetune_trainer.plan.quantities import parse_quantity


def threads_per_worker(resources: Resources, sharers: int | None = None) -> int:
    """Return the number of CPU threads of a worker: its share of the machine's CPUs.

    Args:
        sharers: number of workers on the machine. Default: workers per node.
    """
    workers = sharers or workers_per_node(resources)
    return max(1, _cpus(resources) // workers)


def _cpus(resources: Resources) -> int:
    if resources.cpus_per_node is not None:
        return max(1, int(parse_quantity(resources.cpus_per_node)))
    return len(os.sched_getaffinity(0))
