"""Reports workers that wait because their Ray placement group stays pending."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util import placement_group_table

FIRST_SECONDS = 20.0
"""How long workers may wait before it is reported: nodes join one after the other."""
POLL_SECONDS = 5.0
SHOWN = ("CPU", "GPU", "finetune_worker")
Json = dict[str, Any]


class PlacementWatch:
    """Polls Ray's placement groups until the workers have started.

    Args:
        report: receives what the workers wait for, and an empty text once they no longer wait.
    """

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._clock = report, clock
        self._since: float | None = None
        self._next = clock() + POLL_SECONDS
        self._reported = ""
        self._started = False

    def workers_started(self) -> None:
        """Stop polling: the workers run."""
        self._started = True
        self._report_change("")

    def poll(self) -> None:
        """Check the placement groups if the poll interval has passed."""
        now = self._clock()
        if self._started or now < self._next:
            return
        self._next = now + POLL_SECONDS
        pending = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
        self._since = None if not pending else self._since or now
        if self._since is None:
            self._report_change("")
        elif now - self._since >= FIRST_SECONDS - POLL_SECONDS:
            nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
            self._report_change(describe_pending(pending[0]["bundles"].values(), nodes))

    def _report_change(self, text: str) -> None:
        if text != self._reported:
            self._reported = text
            self._report(text)


def describe_pending(bundles: Iterable[Json], nodes: list[Json]) -> str:
    """Return a message with the requested resources and those of each alive node."""
    requested = list(bundles)
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    offers = "; ".join(_amounts(resources) for resources in alive)
    return f"no room for {len(requested)} workers of {_amounts(requested[0])} each: {len(alive)} nodes offer {offers}"


def _amounts(resources: Json) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in SHOWN if resources.get(name)) or "nothing"
