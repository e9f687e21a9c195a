"""Fetches files once per node: one worker of each node does it, and the others of the node wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import ray

from finetune_api.runconfig import RunConfig
from finetune_trainer.data.cache_usage import Places, places_used, use_tables
from finetune_trainer.launch.sharing.carriers import (
    Carrier,
    RayCarrier,
    ReaderActor,
    StorageCarrier,
    nodes_share_cache,
    nodes_share_storage,
    start_reader,
)
from finetune_trainer.launch.sharing.files import local_roots
from finetune_trainer.launch.sharing.receiver import Receiver
from finetune_trainer.launch.sharing.records import Offer, SharedDirectory
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.runtime import node_name
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import Placement

T = TypeVar("T")


@dataclass(frozen=True)
class NodeFiles:
    """The shared files of the nodes of a worker group, on one worker.

    Args:
        nodes: number of nodes of the group.
        log: receives log lines, on workers that fetch something.
    """

    run: RunConfig
    storage: Storage
    placement: Placement
    collectives: Collectives
    nodes: int
    log: Callable[[str], None]

    @property
    def fetches(self) -> bool:
        """Whether this worker fetches for its node."""
        return self.placement.local_rank == 0

    def receive(self, offer: Offer) -> None:
        """Fetch the offered directories that this node does not have.

        Raises:
            OSError: the node or the storage that has them does not respond, or a file arrived damaged.
        """
        if self.fetches and self.nodes > 1 and offer.directories:
            roots = local_roots(self.run.cache_dir)
            missing = [one for one in offer.directories if not (roots.root_of(one) / offer.marker).exists()]
            self._fetch(self._carrier(offer.actor), missing)
        use_tables(offer.tables)

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Call `work`, which writes to this node's disk, on one worker of each node; return its result on all workers.

        Paths are the same on all nodes, so the result of any node is valid on all.
        """
        if not self.collectives.distributed:
            return work()
        own = work() if self.fetches else None
        result: T = next(one for one in self.collectives.gather(own) if one is not None)
        return result

    def prepare_once(self, work: Callable[[], T]) -> T:
        """Prepare data that the driver could not prepare, on rank 0 only; the other nodes fetch it from there."""
        if self.nodes < 2:
            return work()
        first = self.placement.rank == 0
        before = places_used()
        result = work() if first else None
        actor, new = self._offer_new(before) if first else (None, Places())
        name, offered = self.collectives.gather((actor.name if actor else "", new))[0]
        if self.fetches and not first and not nodes_share_cache(self.run):
            self._fetch(self._carrier(name), [SharedDirectory("cache", path) for path in offered.paths])
        use_tables(offered.tables)
        self.collectives.barrier()
        return result if result is not None else work()

    def _carrier(self, actor: str) -> Carrier:
        return RayCarrier(actor, self.nodes) if actor else StorageCarrier(self.storage)

    def _offer_new(self, before: Places) -> tuple[ReaderActor | None, Places]:
        """Offer the directories that this worker has opened since `before`."""
        now = places_used()
        prepared = tuple(name for name in now.prepared if name not in before.prepared)
        tables = {name: path for name, path in now.tables.items() if before.tables.get(name) != path}
        new, roots = Places(tables, prepared), local_roots(self.run.cache_dir)
        if nodes_share_cache(self.run):
            return None, Places(tables)
        if not nodes_share_storage(self.run, self.storage):
            return start_reader(roots), new
        carrier = StorageCarrier(self.storage)
        for path in new.paths:
            carrier.put(SharedDirectory("cache", path), roots.path_of(SharedDirectory("cache", path)))
        return None, new

    def _fetch(self, carrier: Carrier, directories: list[SharedDirectory]) -> None:
        receiver = Receiver(local_roots(self.run.cache_dir), carrier.read, carrier.chunk, carrier.streams)
        for shared in directories:
            began = time.monotonic()
            count = receiver.receive(shared, partial(carrier.entries, shared))
            if count:
                seconds = time.monotonic() - began
                self.log(f"node {node_name()} fetched {shared.path}: {human_bytes(count)} in {seconds:.1f} s")


def count_nodes(collectives: Collectives) -> int:
    """Return the number of nodes on which the workers of this group run."""
    if not collectives.distributed:
        return 1
    return len(set(collectives.gather(ray.get_runtime_context().get_node_id())))
