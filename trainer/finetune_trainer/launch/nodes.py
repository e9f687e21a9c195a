"""Whether all nodes of a job's Ray cluster are there."""

from __future__ import annotations

import os
import threading
import time

import ray

from finetune_api.cluster import Resources
from finetune_trainer.launch.node_role import replaces_nodes

BACK_SECONDS = 60.0
"""How long a lost node may take to come back. In an Indexed Job its pod never does, so this is for a connection that
was cut."""
REPLACED_SECONDS = 600.0
"""How long it may take where the engine makes a new pod in place of the lost one: it may have to pull the image."""
LOOK_SECONDS = 1.0


class Nodes:
    """The nodes that a job can't do without.

    Args:
        stop: ends the wait for them.
    """

    def __init__(self, resources: Resources, stop: threading.Event) -> None:
        self._least = (resources.min_nodes or resources.nodes or 1) if os.environ.get("RAY_ADDRESS") else 1
        self._stop = stop

    def missing(self, seconds: float | None = None) -> str:
        """Return what is missing after that time at most; empty once all are there."""
        patience = REPLACED_SECONDS if replaces_nodes() else BACK_SECONDS
        deadline = time.monotonic() + (patience if seconds is None else seconds)
        while (alive := _alive()) < self._least:
            if time.monotonic() > deadline or self._stop.wait(LOOK_SECONDS):
                return f"a node was lost and did not come back: {alive} of {self._least} are there"
        return ""


def may_have_several_nodes(resources: Resources) -> bool:
    """Whether the job runs on a cluster and asks for more than one node."""
    return bool(os.environ.get("RAY_ADDRESS")) and (resources.max_nodes or resources.nodes or 1) > 1


def _alive() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())
