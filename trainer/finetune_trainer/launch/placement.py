"""What a job's workers wait for while Ray has no room for them: a placement group that stays pending."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.util import placement_group_table

FIRST_SECONDS = 20.0
"""How long workers may wait before it is said: nodes join one after the other."""
LOOK_SECONDS = 5.0
SHOWN = ("CPU", "GPU", "finetune_worker")
Json = dict[str, Any]


class Placement:
    """Looks at Ray's placement groups until the workers have begun.

    Args:
        say: called with what the workers wait for, and with an empty text once they don't.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._since: float | None = None
        self._next = clock() + LOOK_SECONDS
        self._said = ""
        self._over = False

    @property
    def queued(self) -> bool:
        """Whether the workers were seen to wait for room when it was last looked."""
        return self._since is not None

    def begun(self) -> None:
        """The workers run: there is nothing to look for until they are started again."""
        self._over = True
        self._tell("")

    def look(self) -> None:
        """Look, if it is time to."""
        now = self._clock()
        if self._over or now < self._next:
            return
        self._next = now + LOOK_SECONDS
        pending = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
        self._since = None if not pending else self._since or now
        if self._since is None:
            self._tell("")
        elif now - self._since >= FIRST_SECONDS - LOOK_SECONDS:
            self._tell(words(pending[0]["bundles"].values(), ray.nodes()))

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)


def words(bundles: Iterable[Json], nodes: list[Json]) -> str:
    """Return what is asked for and what each living node offers, for people."""
    wanted = list(bundles)
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    offers = "; ".join(_amounts(resources) for resources in alive)
    return f"no room for {len(wanted)} workers of {_amounts(wanted[0])} each: {len(alive)} nodes offer {offers}"


def _amounts(resources: Json) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in SHOWN if resources.get(name)) or "nothing"
