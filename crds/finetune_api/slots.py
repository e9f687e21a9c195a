"""How many of a job's workers each node takes: a resource of our own that Ray counts on every node.

A node offers Ray more CPUs than it has, so that Ray Train's helpers always find one. Without this resource Ray would
put all workers of a job without GPUs on the first node that joins.
"""

from __future__ import annotations

import json

from finetune_api.cluster import Resources

SLOT = "finetune_worker"
LEAST_CPUS = 64
"""CPUs that each node offers to Ray at least."""


def workers_per_node(resources: Resources, gpus: int | None = None) -> int:
    """Return one worker for each GPU of a node, or without GPUs as many as the job says.

    Args:
        gpus: GPUs of a node. Default: those that the job names.
    """
    return (resources.gpus_per_node if gpus is None else gpus) or resources.workers_per_node or 1


def offered(resources: Resources) -> str:
    """Return what a node offers, as `ray start --resources` takes it."""
    return json.dumps({SLOT: workers_per_node(resources)})
