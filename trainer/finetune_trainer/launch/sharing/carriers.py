"""By what directories travel: the job's storage, or a Ray actor on the node that has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.sharing.files import Entry, Roots, entries_of, read_chunk
from finetune_trainer.launch.sharing.records import Place
from finetune_trainer.layout import SHARED
from finetune_trainer.storage.filesystem import Storage

IN_FLIGHT_BYTES = 64 << 20
"""Most bytes of chunks that all nodes together have on their way: a quarter of Ray's object store on a node."""
LARGEST_CHUNK, SMALLEST_CHUNK = 8 << 20, 64 << 10
STREAMS = 2
"""Files that a node fetches at once."""
STORE_CHUNK, STORE_STREAMS = 16 << 20, 4
"""The same of a store, where nodes do not share the memory of one."""
ENTRIES = "entries.json"
T = TypeVar("T")


def chunk_bytes(nodes: int) -> int:
    """Return the bytes of a chunk, so that all nodes at once stay below `IN_FLIGHT_BYTES` on the node that sends."""
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, IN_FLIGHT_BYTES // (STREAMS * max(nodes, 1))))


class Carrier(Protocol):
    """Reads the directories of another node."""

    chunk: int
    """Bytes of a chunk."""
    streams: int
    """Files to fetch at once."""

    def entries(self, place: Place) -> list[Entry]:
        """Return what a directory holds."""

    def read(self, place: Place, path: str, offset: int, size: int) -> bytes:
        """Return a chunk of a file."""


class Shelf:
    """The Ray actor. It runs on the node whose directories it reads."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._entries: dict[Place, list[Entry]] = {}

    def entries(self, place: Place) -> list[Entry]:
        if place not in self._entries:
            self._entries[place] = entries_of(self._roots.of(place))
        return self._entries[place]

    def read(self, place: Place, path: str, offset: int, size: int) -> bytes:
        return read_chunk(self._roots.of(place), path, offset, size)


@dataclass(frozen=True)
class OpenShelf:
    """A shelf by the name under which other nodes find it. `handle` keeps the actor alive."""

    name: str
    handle: Any


def open_shelf(roots: Roots) -> OpenShelf:
    """Start a shelf on this process's node. It needs no CPU of its own, and starts again where it ends."""
    name = f"shelf-{uuid4().hex[:12]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Shelf)
    options = {"num_cpus": 0, "max_concurrency": 4, "max_restarts": 3, "max_task_retries": 3}
    return OpenShelf(name, actor.options(name=name, scheduling_strategy=here, **options).remote(roots))


class RayCarrier:
    """Reads by a shelf.

    Args:
        nodes: how many read from it at the same time.
    """

    streams = STREAMS

    def __init__(self, name: str, nodes: int) -> None:
        self._shelf = ray.get_actor(name)
        self.chunk = chunk_bytes(nodes)

    def entries(self, place: Place) -> list[Entry]:
        found: list[Entry] = _answer(lambda: ray.get(self._shelf.entries.remote(place)), place)
        return found

    def read(self, place: Place, path: str, offset: int, size: int) -> bytes:
        return bytes(_answer(lambda: ray.get(self._shelf.read.remote(place, path, offset, size)), place))


def _answer(ask: Callable[[], T], place: Place) -> T:
    """Raises OSError where the other node does not answer, so that it counts as an outage."""
    try:
        return ask()
    except RayTaskError as error:
        raise OSError(f"{place.path} can't be read on the node that has it: {error.cause}") from error
    except RayActorError as error:
        raise ConnectionError(f"{place.path} can't be fetched: the node that has it is away: {error}") from error


class StorageCarrier:
    """Keeps directories in the job's storage while the job runs."""

    chunk, streams = STORE_CHUNK, STORE_STREAMS

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, place: Place, directory: Path) -> None:
        """Upload a directory, what it holds last. One that an earlier attempt has uploaded is left as it is."""
        entries, list_at = entries_of(directory), f"{_at(place)}/{ENTRIES}"
        text = json.dumps([asdict(entry) for entry in entries])
        if self._storage.exists(list_at) and self._storage.read_text(list_at) == text:
            return
        self._storage.upload(directory, _at(place), [entry.path for entry in entries if not entry.link])
        self._storage.write_text(list_at, text)

    def entries(self, place: Place) -> list[Entry]:
        return [Entry(**one) for one in json.loads(self._storage.read_text(f"{_at(place)}/{ENTRIES}"))]

    def read(self, place: Place, path: str, offset: int, size: int) -> bytes:
        return self._storage.read_range(f"{_at(place)}/{path}", offset, offset + size)


def _at(place: Place) -> str:
    return f"{SHARED}/{place.root}/{place.path}"


def shares_cache(run: RunConfig) -> bool:
    """Whether all nodes have one cache, in which they find what one of them has put there."""
    return run.job.spec.kubernetes.model_cache_claim is not None


def by_storage(run: RunConfig, storage: Storage) -> bool:
    """Whether every node sees the job's storage: a remote store or a claim. A plain path may be each node's own."""
    return not storage.is_local or (run.job.spec.storage.uri or "").startswith("pvc://")
