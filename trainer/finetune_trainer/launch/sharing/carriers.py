"""Transports for shared directories: the job's storage, or a Ray actor on the node that has them."""

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
from finetune_trainer.launch.sharing.files import Entry, Roots, list_entries, read_chunk
from finetune_trainer.launch.sharing.records import SharedDirectory
from finetune_trainer.layout import SHARED
from finetune_trainer.storage.filesystem import Storage

IN_FLIGHT_BYTES = 64 << 20
"""Limit of the chunks that all nodes together are fetching: a quarter of Ray's object store on the sending node."""
LARGEST_CHUNK, SMALLEST_CHUNK = 8 << 20, 64 << 10
STREAMS = 2
"""Files that a node fetches in parallel from the actor."""
STORE_CHUNK, STORE_STREAMS = 16 << 20, 4
"""Chunk size and parallel files of a fetch from storage, where no single node holds all chunks in memory."""
ENTRIES = "entries.json"
T = TypeVar("T")


def chunk_bytes(nodes: int) -> int:
    """Return the chunk size in bytes with which all nodes together stay below `IN_FLIGHT_BYTES`."""
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, IN_FLIGHT_BYTES // (STREAMS * max(nodes, 1))))


class Carrier(Protocol):
    """Reads the shared directories of another node."""

    chunk: int
    """Chunk size in bytes."""
    streams: int
    """Files to fetch in parallel."""

    def entries(self, shared: SharedDirectory) -> list[Entry]:
        """Return the files of a directory."""

    def read(self, shared: SharedDirectory, path: str, offset: int, size: int) -> bytes:
        """Return a chunk of a file."""


class DirectoryReader:
    """A Ray actor that reads shared directories of the node on which it runs."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._entries: dict[SharedDirectory, list[Entry]] = {}

    def entries(self, shared: SharedDirectory) -> list[Entry]:
        if shared not in self._entries:
            self._entries[shared] = list_entries(self._roots.path_of(shared))
        return self._entries[shared]

    def read(self, shared: SharedDirectory, path: str, offset: int, size: int) -> bytes:
        return read_chunk(self._roots.path_of(shared), path, offset, size)


@dataclass(frozen=True)
class ReaderActor:
    """A running `DirectoryReader`. Other nodes find it by its name; the handle keeps it alive."""

    name: str
    handle: Any


def start_reader(roots: Roots) -> ReaderActor:
    """Start a `DirectoryReader` on this node. It needs no CPU of its own, and Ray restarts it if it ends."""
    name = f"directory-reader-{uuid4().hex[:12]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(DirectoryReader)
    options = {"num_cpus": 0, "max_concurrency": 4, "max_restarts": 3, "max_task_retries": 3}
    return ReaderActor(name, actor.options(name=name, scheduling_strategy=here, **options).remote(roots))


class RayCarrier:
    """Reads shared directories from a `DirectoryReader`.

    Args:
        name: name of the actor.
        nodes: number of nodes that read from it at the same time.
    """

    streams = STREAMS

    def __init__(self, name: str, nodes: int) -> None:
        self._actor = ray.get_actor(name)
        self.chunk = chunk_bytes(nodes)

    def entries(self, shared: SharedDirectory) -> list[Entry]:
        entries: list[Entry] = _remote_call(lambda: ray.get(self._actor.entries.remote(shared)), shared)
        return entries

    def read(self, shared: SharedDirectory, path: str, offset: int, size: int) -> bytes:
        return bytes(_remote_call(lambda: ray.get(self._actor.read.remote(shared, path, offset, size)), shared))


def _remote_call(call: Callable[[], T], shared: SharedDirectory) -> T:
    """Call the actor; raise OSError if its node does not respond, so that the failure counts as an outage."""
    try:
        return call()
    except RayTaskError as error:
        raise OSError(f"{shared.path} can't be read on the node that has it: {error.cause}") from error
    except RayActorError as error:
        raise ConnectionError(
            f"{shared.path} can't be fetched: the node that has it does not respond: {error}"
        ) from error


class StorageCarrier:
    """Writes shared directories to the job's storage, where they stay until the job is done, and reads them."""

    chunk, streams = STORE_CHUNK, STORE_STREAMS

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, shared: SharedDirectory, directory: Path) -> None:
        """Upload a directory and then the list of its files. Skip one that an earlier attempt has uploaded."""
        entries, list_at = list_entries(directory), f"{_storage_path(shared)}/{ENTRIES}"
        text = json.dumps([asdict(entry) for entry in entries])
        if self._storage.exists(list_at) and self._storage.read_text(list_at) == text:
            return
        self._storage.upload(directory, _storage_path(shared), [entry.path for entry in entries if not entry.link])
        self._storage.write_text(list_at, text)

    def entries(self, shared: SharedDirectory) -> list[Entry]:
        return [Entry(**one) for one in json.loads(self._storage.read_text(f"{_storage_path(shared)}/{ENTRIES}"))]

    def read(self, shared: SharedDirectory, path: str, offset: int, size: int) -> bytes:
        return self._storage.read_range(f"{_storage_path(shared)}/{path}", offset, offset + size)


def _storage_path(shared: SharedDirectory) -> str:
    return f"{SHARED}/{shared.root}/{shared.path}"


def nodes_share_cache(run: RunConfig) -> bool:
    """Whether all nodes mount the same cache, so that nothing must be copied."""
    return run.job.spec.kubernetes.model_cache_claim is not None


def nodes_share_storage(run: RunConfig, storage: Storage) -> bool:
    """Whether every node sees the job's storage: a remote store or a claim. A plain path may be local to each node."""
    return not storage.is_local or (run.job.spec.storage.uri or "").startswith("pvc://")
