"""Ray custom resource that limits the number of workers per node.

Each node declares at least `LEAST_CPUS` CPUs to Ray, so that the helper actors of Ray Train can always be scheduled.
Without the custom resource, Ray would place all workers of a CPU job on the first node that joins.
"""

from __future__ import annotations

import json

from finetune_api.cluster import Resources

SLOT = "finetune_worker"
LEAST_CPUS = 64
"""Minimum number of CPUs that a node declares to Ray."""


def workers_per_node(resources: Resources, gpus: int | None = None) -> int:
    """Return the number of workers per node: one per GPU, or `workersPerNode` on nodes without GPUs.

    Args:
        gpus: GPUs of a node. Default: `resources.gpusPerNode`.
    """
    return (resources.gpus_per_node if gpus is None else gpus) or resources.workers_per_node or 1


def offered(resources: Resources) -> str:
    """Return the custom resources of a node as JSON for `ray start --resources`."""
    return json.dumps({SLOT: workers_per_node(resources)})
