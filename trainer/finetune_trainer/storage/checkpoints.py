"""Checkpoints of one stage in storage: a checkpoint is complete or it does not count.

Every worker writes its files into `checkpoint-<step>`; when all are there, one of them writes the manifest, which names
each file and its size. A directory without a manifest, or whose files differ from it, is what a killed run left
behind: it is ignored, and cleaned up when the stage starts again. What is there is found by looking at storage, because
Ray's controller can lose a checkpoint that a worker reported just before it died.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.layout import CHECKPOINT_PREFIX, MANIFEST, StageLayout
from finetune_trainer.storage.filesystem import Storage


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint complete. `files` maps each file's path in the checkpoint to its size in bytes."""

    step: int
    world_size: int
    zero: int
    rows_per_step: int
    """The global batch of the stage, which it keeps with any number of workers."""
    shards: int
    """In so many shards a stream of training rows is read."""
    files: dict[str, int]
    saved_at: float
    data: dict[str, Any] | None = None
    """What the stage was training on (`data.identity.DataKey`); None from versions that did not record it."""


class CheckpointStore:
    """The checkpoints below `<stage>/checkpoints`."""

    def __init__(self, storage: Storage, layout: StageLayout, scratch: Path) -> None:
        self.storage = storage
        self.layout = layout
        self.scratch = scratch
        self._known: dict[int, Manifest] = {}
        """Complete checkpoints seen so far. They don't change until this object deletes them."""

    @property
    def workdir(self) -> Path:
        """Local directory in which `checkpoint-<step>` is written: in place, or in scratch for a remote store."""
        return self.storage.local(self.layout.checkpoints) or self.scratch

    def publish(
        self,
        step: int,
        *,
        world_size: int,
        zero: int,
        rows_per_step: int,
        shards: int,
        data: dict[str, Any] | None = None,
    ) -> Manifest:
        """Make a fully written checkpoint complete. Called once, by one worker, after every worker's `push`."""
        files = self.storage.sizes(self.layout.checkpoint(step))
        files.pop(MANIFEST, None)
        manifest = Manifest(step, world_size, zero, rows_per_step, shards, files, time.time(), data)
        self.storage.write_text(f"{self.layout.checkpoint(step)}/{MANIFEST}", json.dumps(asdict(manifest), indent=1))
        self._known[step] = manifest
        return manifest

    def push(self, step: int) -> None:
        """Copy this machine's part of a checkpoint to storage; nothing to do where it was written in place."""
        if not self.storage.is_local:
            self.storage.upload(self.place(step), self.layout.checkpoint(step))

    def push_metrics(self, metrics: Path) -> None:
        """Copy the curve so far to storage, for whoever goes on from there; as `push`."""
        if not self.storage.is_local:
            self.storage.write_bytes(self.layout.metrics, metrics.read_bytes())

    def place(self, step: int) -> Path:
        """The local directory in which a checkpoint is written, and to which one is fetched."""
        return self.workdir / f"{CHECKPOINT_PREFIX}{step}"

    def fetch(self, step: int) -> None:
        """Copy a checkpoint from storage to its place on this machine; nothing to do where it is there."""
        self.storage.download(self.layout.checkpoint(step), self.place(step))

    def drop_copy(self, step: int) -> None:
        """Delete this machine's copy of a checkpoint that is in a remote storage."""
        if not self.storage.is_local:
            shutil.rmtree(self.place(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all checkpoint directories, complete or not, ascending."""
        names = self._names()
        numbers = [name.removeprefix(CHECKPOINT_PREFIX) for name in names if name.startswith(CHECKPOINT_PREFIX)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _names(self) -> set[str]:
        """Some S3 servers (SeaweedFS) keep the directory of deleted files: there only files count."""
        if self.storage.is_local:
            return set(self.storage.names(self.layout.checkpoints))
        return {path.partition("/")[0] for path in self.storage.sizes(self.layout.checkpoints)}

    def manifest(self, step: int) -> Manifest | None:
        """The manifest of a complete checkpoint, or None where it isn't complete."""
        if step not in self._known and (found := self._read(step)) is not None:
            self._known[step] = found
        return self._known.get(step)

    def _read(self, step: int) -> Manifest | None:
        try:
            manifest = Manifest(**json.loads(self.storage.read_text(f"{self.layout.checkpoint(step)}/{MANIFEST}")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        present = self.storage.sizes(self.layout.checkpoint(step))
        whole = all(present.get(name) == size for name, size in manifest.files.items())
        return manifest if whole and manifest.files else None

    def newest(self) -> Manifest | None:
        """The complete checkpoint with the highest step."""
        manifests = (self.manifest(step) for step in reversed(self.steps()))
        return next((manifest for manifest in manifests if manifest is not None), None)

    def prune(self, keep: int) -> None:
        """Delete all complete checkpoints but the newest `keep`."""
        complete = [step for step in self.steps() if self.manifest(step) is not None]
        for step in complete[:-keep]:
            self._delete(step)

    def clean(self) -> list[int]:
        """Delete what is not complete; returns the steps. Only safe while no worker saves."""
        torn = [step for step in self.steps() if self.manifest(step) is None]
        for step in torn:
            self._delete(step)
        self.storage.drop_uploads(self.layout.checkpoints)
        return torn

    def _delete(self, step: int) -> None:
        self._known.pop(step, None)
        # The manifest goes first, so that a half-deleted checkpoint is never taken for a complete one.
        self.storage.delete(f"{self.layout.checkpoint(step)}/{MANIFEST}")
        self.storage.delete(self.layout.checkpoint(step))
