"""Checkpoints of one stage in storage: a checkpoint is complete or it does not count.

Every worker writes its files into `checkpoint-<step>`; when all are there, one of them writes the manifest, which names
each file and its size. A directory without a manifest, or whose files differ from it, is what a killed run left
behind: it is ignored, and cleaned up when the stage starts again. What is there is found by looking at storage, because
Ray's controller can lose a checkpoint that a worker reported just before it died.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_trainer.layout import CHECKPOINT_PREFIX, MANIFEST, StageLayout
from finetune_trainer.storage import Storage


@dataclass(frozen=True)
class Manifest:
    """What makes a checkpoint complete. `files` maps each file's path in the checkpoint to its size in bytes."""

    step: int
    world_size: int
    zero: int
    files: dict[str, int]
    saved_at: float


class CheckpointStore:
    """The checkpoints below `<stage>/checkpoints`."""

    def __init__(self, storage: Storage, layout: StageLayout, scratch: Path) -> None:
        self.storage = storage
        self.layout = layout
        self.scratch = scratch

    @property
    def workdir(self) -> Path:
        """Local directory in which `checkpoint-<step>` is written: in place, or in scratch for a remote store."""
        return self.storage.local(self.layout.checkpoints) or self.scratch

    def publish(self, step: int, world_size: int, zero: int) -> Manifest:
        """Make a fully written checkpoint complete. Called once, by one worker, after every worker's `push`."""
        files = self.storage.sizes(self.layout.checkpoint(step))
        files.pop(MANIFEST, None)
        manifest = Manifest(step, world_size, zero, files, time.time())
        self.storage.write_text(f"{self.layout.checkpoint(step)}/{MANIFEST}", json.dumps(asdict(manifest), indent=1))
        return manifest

    def push(self, step: int) -> None:
        """Copy this machine's part of a checkpoint to storage; nothing to do where it was written in place."""
        if not self.storage.is_local:
            self.storage.upload(self.workdir / f"{CHECKPOINT_PREFIX}{step}", self.layout.checkpoint(step))

    def fetch(self, step: int) -> Path:
        """A local directory that holds the checkpoint."""
        return self.storage.download(self.layout.checkpoint(step), self.scratch / f"{CHECKPOINT_PREFIX}{step}")

    def steps(self) -> list[int]:
        """Steps of all checkpoint directories, complete or not, ascending."""
        names = self.storage.names(self.layout.checkpoints)
        numbers = [name.removeprefix(CHECKPOINT_PREFIX) for name in names if name.startswith(CHECKPOINT_PREFIX)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def manifest(self, step: int) -> Manifest | None:
        """The manifest of a complete checkpoint, or None where it isn't complete."""
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
        return torn

    def _delete(self, step: int) -> None:
        # The manifest goes first, so that a half-deleted checkpoint is never taken for a complete one.
        self.storage.delete(f"{self.layout.checkpoint(step)}/{MANIFEST}")
        self.storage.delete(self.layout.checkpoint(step))
