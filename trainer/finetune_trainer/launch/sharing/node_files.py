"""The workers' side: one worker of each node fetches, and its neighbours wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import ray

from finetune_api.runconfig import RunConfig
from finetune_trainer.data.cache_usage import Places, places_used, use_tables
from finetune_trainer.launch.sharing.carriers import (
    Carrier,
    OpenShelf,
    RayCarrier,
    StorageCarrier,
    by_storage,
    open_shelf,
    shares_cache,
)
from finetune_trainer.launch.sharing.files import roots_here
from finetune_trainer.launch.sharing.receiver import Receiver
from finetune_trainer.launch.sharing.records import Offer, Place
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.runtime import node_name
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Peers
from finetune_trainer.training.context import Placement

T = TypeVar("T")


@dataclass(frozen=True)
class NodeFiles:
    """Files of the nodes of a worker group.

    Args:
        nodes: how many there are.
        say: called with a line for people, on the worker that has fetched something.
    """

    run: RunConfig
    storage: Storage
    placement: Placement
    peers: Peers
    nodes: int
    say: Callable[[str], None]

    @property
    def leads(self) -> bool:
        """Whether this worker fetches for its node."""
        return self.placement.local_rank == 0

    def receive(self, offer: Offer) -> None:
        """Fetch what the driver's node has and this node lacks.

        Raises:
            OSError: the node or the store that has it went away, or a file came damaged.
        """
        if self.leads and self.nodes > 1 and offer.places:
            carrier = RayCarrier(offer.shelf, self.nodes) if offer.shelf else StorageCarrier(self.storage)
            roots = roots_here(self.run.cache_dir)
            self._fetch(carrier, [one for one in offer.places if not (roots.root_of(one) / offer.marker).exists()])
        use_tables(offer.tables)

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Do work that fills this node's disk on one worker, and return what it returned on every worker.

        All nodes have the same paths, so that of any node holds for all.
        """
        if not self.peers.many:
            return work()
        found = work() if self.leads else None
        made: T = next(one for one in self.peers.collect(found) if one is not None)
        return made

    def prepare_once(self, work: Callable[[], T]) -> T:
        """Prepare data that the driver could not: on the first worker alone, whose node the others fetch it from."""
        if self.nodes < 2:
            return work()
        first = self.placement.rank == 0
        before = places_used()
        made = work() if first else None
        shelf, new = self._offered(before) if first else (None, Places())
        name, found = self.peers.collect((shelf.name if shelf else "", new))[0]
        if self.leads and not first and not shares_cache(self.run):
            carrier = RayCarrier(name, self.nodes) if name else StorageCarrier(self.storage)
            self._fetch(carrier, [Place("cache", path) for path in found.paths])
        use_tables(found.tables)
        self.peers.wait()
        return made if made is not None else work()

    def _offered(self, before: Places) -> tuple[OpenShelf | None, Places]:
        """Offer the directories that this worker has opened since then."""
        now = places_used()
        fresh = tuple(name for name in now.prepared if name not in before.prepared)
        tables = {name: place for name, place in now.tables.items() if before.tables.get(name) != place}
        new, roots = Places(tables, fresh), roots_here(self.run.cache_dir)
        if shares_cache(self.run):
            return None, Places(tables)
        if not by_storage(self.run, self.storage):
            return open_shelf(roots), new
        carrier = StorageCarrier(self.storage)
        for path in new.paths:
            carrier.put(Place("cache", path), roots.of(Place("cache", path)))
        return None, new

    def _fetch(self, carrier: Carrier, places: list[Place]) -> None:
        receiver = Receiver(roots_here(self.run.cache_dir), carrier.read, carrier.chunk, carrier.streams)
        for place in places:
            began = time.monotonic()
            count = receiver.receive(place, lambda place=place: carrier.entries(place))  # type: ignore[misc]
            if count:
                seconds = time.monotonic() - began
                self.say(f"node {node_name()} got {place.path}: {human_bytes(count)} in {seconds:.1f} s")


def count_nodes(peers: Peers) -> int:
    """Return on how many nodes the workers of this group run."""
    if not peers.many:
        return 1
    return len(set(peers.collect(ray.get_runtime_context().get_node_id())))
