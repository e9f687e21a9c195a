"""The driver's side: what its node has that the others lack, and by what it travels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from finetune_api.runconfig import RunConfig
from finetune_trainer.data.cache_usage import places_used
from finetune_trainer.hub import hub_access
from finetune_trainer.launch.sharing.carriers import OpenShelf, StorageCarrier, by_storage, open_shelf, shares_cache
from finetune_trainer.launch.sharing.files import roots_here
from finetune_trainer.launch.sharing.records import Offer, Place
from finetune_trainer.layout import SHARED, StageLayout
from finetune_trainer.model.weights import weight_files
from finetune_trainer.stage_graph import stage_before
from finetune_trainer.storage.filesystem import Storage


class Offers:
    """What this driver offers. It keeps the actor alive.

    Args:
        log: called with a line for people.
    """

    def __init__(self, run: RunConfig, storage: Storage, log: Callable[[str], None]) -> None:
        self.run, self.storage, self.log = run, storage, log
        self._shelf: OpenShelf | None = None
        self._marker = f".driver-{uuid4().hex[:12]}"
        self._marked: list[Path] = []

    def make(self) -> Offer:
        """Return what the other nodes are to fetch. Directories go to storage where every node sees that."""
        used, roots = places_used(), roots_here(self.run.cache_dir)
        if shares_cache(self.run):
            return Offer(tables=used.tables)
        places = [Place("cache", path) for path in used.paths] + hub_places(self.run, roots.hub)
        here = tuple(place for place in places if roots.of(place).is_dir())
        self._mark({roots.root_of(place) for place in here})
        if not by_storage(self.run, self.storage):
            self._shelf = self._shelf or open_shelf(roots)
            return Offer(here, used.tables, self._shelf.name, self._marker)
        carrier = StorageCarrier(self.storage)
        for place in here:
            self.log(f"puts {place.path} into storage for the other nodes")
            carrier.put(place, roots.of(place))
        return Offer(here, used.tables, marker=self._marker)

    def _mark(self, directories: set[Path]) -> None:
        for directory in directories:
            self._marked.append(directory / self._marker)
            self._marked[-1].touch()

    def close(self, *, done: bool) -> None:
        """Take the marks away, and what is in storage where the job is done: a later attempt needs it until then."""
        for path in self._marked:
            path.unlink(missing_ok=True)
        if done and by_storage(self.run, self.storage):
            with suppress(OSError):  # the job is done all the same
                self.storage.delete(SHARED)


def fetch_weights(run: RunConfig, todo: list[StageLayout], log: Callable[[str], None]) -> None:
    """Download the weights of the job's hub model to the driver's node, where a stage that is left needs them.

    Weights of `model.uri` and of finished stages are in a store already, from which each node gets them once.

    Raises:
        Outage: the hub does not answer.
    """
    name = run.job.spec.model.hub
    if name is None or Path(name).is_dir() or not any(_starts_from_model(run, layout.index) for layout in todo):
        return
    log(f"fetches the weights of {name}, once for all nodes")
    with (
        hub_access(name, "model.hub", run.job.spec.model.revision),
        suppress(OSError),
    ):  # the worker that loads them says why
        weight_files(name, run.job.spec.model.revision)


def _starts_from_model(run: RunConfig, index: int) -> bool:
    stage = run.job.spec.stages[index].spec
    return stage_before(run, index) is None or bool(getattr(stage, "compare_with", ()))


def hub_places(run: RunConfig, hub: str) -> list[Place]:
    """Return where the hub's cache keeps the job's model; none where the job names no model of the hub."""
    name = run.job.spec.model.hub
    if name is None or not Path(hub, repository(name)).is_dir():
        return []
    return [Place("hub", repository(name))]


def repository(name: str) -> str:
    """Return the directory of a model in the hub's cache."""
    from huggingface_hub.file_download import repo_folder_name

    return str(repo_folder_name(repo_id=name, repo_type="model"))
