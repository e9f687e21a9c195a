"""Waits until all nodes that a job needs have joined its Ray cluster."""

from __future__ import annotations

import os
import threading
import time

import ray

from finetune_api.cluster import Resources
from finetune_trainer.launch.node_role import replaces_nodes

RECONNECT_SECONDS = 60.0
"""Timeout for a lost node to reconnect. An Indexed Job does not replace its pod, so only a broken connection heals."""
REPLACE_SECONDS = 600.0
"""Timeout for a lost node if the engine replaces its pod, which may have to pull the image."""
POLL_SECONDS = 1.0


class Nodes:
    """The nodes that a job needs.

    Args:
        stop: ends a wait for them.
    """

    def __init__(self, resources: Resources, stop: threading.Event) -> None:
        self._least = (resources.min_nodes or resources.nodes or 1) if os.environ.get("RAY_ADDRESS") else 1
        self._stop = stop

    def missing(self, seconds: float | None = None) -> str:
        """Wait for all nodes; return an error message if some are missing after the timeout, else an empty text.

        Args:
            seconds: the timeout. Default: by the engine.
        """
        if seconds is None:
            seconds = REPLACE_SECONDS if replaces_nodes() else RECONNECT_SECONDS
        deadline = time.monotonic() + seconds
        while (alive := _alive_nodes()) < self._least:
            if time.monotonic() > deadline or self._stop.wait(POLL_SECONDS):
                return f"a node was lost and did not come back: {alive} of {self._least} nodes are alive"
        return ""


def may_have_several_nodes(resources: Resources) -> bool:
    """Whether the job runs on a cluster and requests more than one node."""
    return bool(os.environ.get("RAY_ADDRESS")) and (resources.max_nodes or resources.nodes or 1) > 1


def _alive_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]  # Ray has no types here
