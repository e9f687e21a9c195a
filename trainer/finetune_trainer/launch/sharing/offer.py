"""Offers the driver's prepared data and weights to the other nodes of the job."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from finetune_api.runconfig import RunConfig
from finetune_trainer.data.cache_usage import places_used
from finetune_trainer.hub import hub_access
from finetune_trainer.launch.sharing.carriers import (
    ReaderActor,
    StorageCarrier,
    nodes_share_cache,
    nodes_share_storage,
    start_reader,
)
from finetune_trainer.launch.sharing.files import local_roots
from finetune_trainer.launch.sharing.records import Offer, SharedDirectory
from finetune_trainer.layout import SHARED, StageLayout
from finetune_trainer.model.weights import weight_files
from finetune_trainer.stage_graph import stage_before
from finetune_trainer.storage.filesystem import Storage


class Offers:
    """The directories that this driver offers to the other nodes, and the actor that serves them.

    Args:
        log: receives log lines.
    """

    def __init__(self, run: RunConfig, storage: Storage, log: Callable[[str], None]) -> None:
        self.run, self.storage, self.log = run, storage, log
        self._actor: ReaderActor | None = None
        self._marker = f".driver-{uuid4().hex[:12]}"
        self._marked: list[Path] = []

    def make(self) -> Offer:
        """Return the directories that other nodes must fetch; upload them first if all nodes share the storage."""
        used, roots = places_used(), local_roots(self.run.cache_dir)
        if nodes_share_cache(self.run):
            return Offer(tables=used.tables)
        wanted = [SharedDirectory("cache", path) for path in used.paths] + hub_directories(self.run, roots.hub)
        local = tuple(shared for shared in wanted if roots.path_of(shared).is_dir())
        self._mark({roots.root_of(shared) for shared in local})
        if not nodes_share_storage(self.run, self.storage):
            self._actor = self._actor or start_reader(roots)
            return Offer(local, used.tables, self._actor.name, self._marker)
        carrier = StorageCarrier(self.storage)
        for shared in local:
            self.log(f"uploads {shared.path} to storage for the other nodes")
            carrier.put(shared, roots.path_of(shared))
        return Offer(local, used.tables, marker=self._marker)

    def _mark(self, directories: set[Path]) -> None:
        """Create the marker file in the roots, by which nodes that share this disk recognise it."""
        for directory in directories:
            self._marked.append(directory / self._marker)
            self._marked[-1].touch()

    def close(self, *, done: bool) -> None:
        """Delete the marker files and, once the job is done, the uploads, which a later attempt would use."""
        for path in self._marked:
            path.unlink(missing_ok=True)
        if done and nodes_share_storage(self.run, self.storage):
            with suppress(OSError):  # a failed cleanup does not fail a job that is done
                self.storage.delete(SHARED)


def fetch_weights(run: RunConfig, todo: list[StageLayout], log: Callable[[str], None]) -> None:
    """Download the weights of the job's hub model to the driver's node if a remaining stage needs them.

    Weights of `model.uri` and of finished stages are in storage, from which each node downloads them once.

    Raises:
        Outage: the hub does not respond.
    """
    name = run.job.spec.model.hub
    if name is None or Path(name).is_dir() or not any(_starts_from_model(run, layout.index) for layout in todo):
        return
    log(f"downloads the weights of {name}, once for all nodes")
    revision = run.job.spec.model.revision
    with hub_access(name, "model.hub", revision), suppress(OSError):  # the worker that loads the weights reports it
        weight_files(name, revision)


def _starts_from_model(run: RunConfig, index: int) -> bool:
    stage = run.job.spec.stages[index].spec
    return stage_before(run, index) is None or bool(getattr(stage, "compare_with", ()))


def hub_directories(run: RunConfig, hub: str) -> list[SharedDirectory]:
    """Return the directory of the job's model in the Hugging Face cache; none if the model is not from the hub."""
    name = run.job.spec.model.hub
    if name is None or not Path(hub, repository(name)).is_dir():
        return []
    return [SharedDirectory("hub", repository(name))]


def repository(name: str) -> str:
    """Return the name of a model's directory in the Hugging Face cache."""
    from huggingface_hub.file_download import repo_folder_name

    return str(repo_folder_name(repo_id=name, repo_type="model"))
