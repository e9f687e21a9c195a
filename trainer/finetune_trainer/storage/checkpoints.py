"""Checkpoints of one stage in storage. Only complete checkpoints count.

Every worker writes its files into `checkpoint-<step>`; then one worker writes the manifest with the name and size of
each file. A directory without a manifest, or whose files differ from it, was left by a killed attempt: it is ignored,
and deleted when the stage starts again. Checkpoints are found by listing storage, because Ray's controller can lose a
checkpoint that a worker has reported just before the controller died.
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
    """The manifest of a complete checkpoint."""

    step: int
    world_size: int
    zero: int
    """ZeRO stage, 0 to 3."""
    rows_per_step: int
    """Global batch size of the stage, which it keeps with any world size."""
    shards: int
    """Number of shards in which a stream of training rows is read."""
    files: dict[str, int]
    """Size in bytes of each file, by its path in the checkpoint."""
    saved_at: float
    data: dict[str, Any] | None = None
    """Identity of the training data (`data.data_identity.DataKey`); None from versions that did not record it."""


class CheckpointStore:
    """The checkpoints of a stage, below `<stage>/checkpoints`.

    Args:
        scratch: local directory of the stage, in which checkpoints for a remote storage are written first.
    """

    def __init__(self, storage: Storage, layout: StageLayout, scratch: Path) -> None:
        self.storage = storage
        self.layout = layout
        self.scratch = scratch
        self._known: dict[int, Manifest] = {}
        """Complete checkpoints found so far. They do not change until this object deletes them."""

    @property
    def workdir(self) -> Path:
        """Local directory in which `checkpoint-<step>` is written: in storage, or in scratch for a remote storage."""
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
        """Write the manifest, which makes the checkpoint complete. One worker calls it, after `push` on all workers."""
        files = self.storage.sizes(self.layout.checkpoint(step))
        files.pop(MANIFEST, None)
        manifest = Manifest(step, world_size, zero, rows_per_step, shards, files, time.time(), data)
        self.storage.write_text(f"{self.layout.checkpoint(step)}/{MANIFEST}", json.dumps(asdict(manifest), indent=1))
        self._known[step] = manifest
        return manifest

    def push(self, step: int) -> None:
        """Upload this machine's part of a checkpoint, unless it was written in storage."""
        if not self.storage.is_local:
            self.storage.upload(self.local_directory(step), self.layout.checkpoint(step))

    def push_metrics(self, metrics: Path) -> None:
        """Upload the metrics file, for an attempt that resumes in another pod."""
        if not self.storage.is_local:
            self.storage.write_bytes(self.layout.metrics, metrics.read_bytes())

    def local_directory(self, step: int) -> Path:
        """Return the local directory of a checkpoint: where it is written, and where `fetch` copies it."""
        return self.workdir / f"{CHECKPOINT_PREFIX}{step}"

    def fetch(self, step: int) -> None:
        """Download a checkpoint to its local directory, unless it is there."""
        self.storage.download(self.layout.checkpoint(step), self.local_directory(step))

    def drop_copy(self, step: int) -> None:
        """Delete this machine's copy of a checkpoint in a remote storage."""
        if not self.storage.is_local:
            shutil.rmtree(self.local_directory(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoint directories, complete or not, in ascending order."""
        names = self._names()
        numbers = [name.removeprefix(CHECKPOINT_PREFIX) for name in names if name.startswith(CHECKPOINT_PREFIX)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _names(self) -> set[str]:
        """Return the names of the directories that contain files: some S3 servers (SeaweedFS) keep empty ones."""
        if self.storage.is_local:
            return set(self.storage.names(self.layout.checkpoints))
        return {path.partition("/")[0] for path in self.storage.sizes(self.layout.checkpoints)}

    def manifest(self, step: int) -> Manifest | None:
        """Return the manifest of a checkpoint, or None if the checkpoint is not complete."""
        if step not in self._known and (found := self._read(step)) is not None:
            self._known[step] = found
        return self._known.get(step)

    def _read(self, step: int) -> Manifest | None:
        try:
            manifest = Manifest(**json.loads(self.storage.read_text(f"{self.layout.checkpoint(step)}/{MANIFEST}")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        present = self.storage.sizes(self.layout.checkpoint(step))
        complete = all(present.get(name) == size for name, size in manifest.files.items())
        return manifest if complete and manifest.files else None

    def newest(self) -> Manifest | None:
        """Return the manifest of the complete checkpoint with the highest step, or None."""
        manifests = (self.manifest(step) for step in reversed(self.steps()))
        return next((manifest for manifest in manifests if manifest is not None), None)

    def prune(self, keep: int) -> None:
        """Delete all complete checkpoints except the newest `keep`."""
        complete = [step for step in self.steps() if self.manifest(step) is not None]
        for step in complete[:-keep]:
            self._delete(step)

    def clean(self) -> list[int]:
        """Delete incomplete checkpoints and return their steps. Only safe while no worker saves a checkpoint."""
        incomplete = [step for step in self.steps() if self.manifest(step) is None]
        for step in incomplete:
            self._delete(step)
        self.storage.drop_uploads(self.layout.checkpoints)
        return incomplete

    def _delete(self, step: int) -> None:
        self._known.pop(step, None)
        # The manifest is deleted first, so that a partly deleted checkpoint does not count as complete.
        self.storage.delete(f"{self.layout.checkpoint(step)}/{MANIFEST}")
        self.storage.delete(self.layout.checkpoint(step))
