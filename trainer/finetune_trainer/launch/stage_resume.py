"""Finds the checkpoint from which a stage resumes and copies it to this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune_trainer.launch.same_data import compare_data
from finetune_trainer.stage_graph import waits_for
from finetune_trainer.storage.checkpoints import CheckpointStore, Manifest
from finetune_trainer.storage.universal_checkpoint import SUFFIX, to_universal
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import ResumePoint, StageContext


class StageResume:
    """The resume of one stage on one worker.

    Args:
        scratch: local directory of the stage.
        log: receives log lines.
    """

    def __init__(
        self,
        context: StageContext,
        store: CheckpointStore,
        collectives: Collectives,
        scratch: Path,
        log: Callable[[str], None],
    ) -> None:
        self.context, self.store, self.collectives, self.scratch, self.log = context, store, collectives, scratch, log

    def resume_point(self) -> ResumePoint | None:
        """Return the newest complete checkpoint, copied to this machine, or None if there is none.

        Delete what an interrupted attempt has left incomplete.

        Raises:
            UserError: the checkpoint was trained on other rows.
        """
        newest = self.store.newest()
        self.collectives.barrier()
        if self.context.placement.rank == 0:
            self.store.clean()
        if self.context.placement.local_rank == 0 and not self.store.storage.is_local:
            shutil.rmtree(self.scratch, ignore_errors=True)  # files of an earlier attempt belong to no checkpoint
        self.collectives.barrier()
        if newest is None:
            return None
        compared = compare_data(self.context.run, self.context.layout.index, newest, self.context.data.key)
        self.log(f"resumes at step {newest.step} from its last checkpoint")
        if list(waits_for(self.context.run, self.context.layout.index)):  # otherwise the driver has logged the notes
            for note in compared.notes:
                self.log(note)
        return replace(self._fetch(newest), other_rows=compared.other_rows)

    def _fetch(self, newest: Manifest) -> ResumePoint:
        """Copy the checkpoint to this machine, converted if the world size has changed."""
        placement, directory = self.context.placement, self.store.local_directory(newest.step)
        universal = self.context.zero > 0 and newest.world_size != placement.world_size
        converted = self.scratch / f"{directory.name}{SUFFIX}"
        if placement.local_rank == 0:
            self.store.fetch(newest.step)
            if universal:
                to_universal(directory, converted)
        if newest.world_size != placement.world_size:
            rows = f"{self.context.rows_per_step} rows per step, as before"
            self.log(f"{newest.world_size} workers wrote it and {placement.world_size} go on, with {rows}")
        self.collectives.barrier()
        return ResumePoint(newest.step, converted if universal else directory, universal)

    def drop_copies(self, resumed: ResumePoint | None) -> None:
        """Delete this machine's copies of the checkpoint from which the stage has resumed."""
        if resumed is None or self.context.placement.local_rank != 0:
            return
        self.store.drop_copy(resumed.step)
        if resumed.universal:
            shutil.rmtree(resumed.directory, ignore_errors=True)
