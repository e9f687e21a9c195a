"""Access of a stage to storage, to the other workers and to the driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.errors import Interrupted
from finetune_trainer.heartbeat import record_progress
from finetune_trainer.progress.channel import WorkerChannel
from finetune_trainer.progress.reporter import Progress
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext

REPORT_SECONDS = 0.5


class StageIO:
    """Storage, collectives and the channel of one worker in one stage. Every worker has one.

    Args:
        scratch: local directory of this stage.
    """

    def __init__(
        self, context: StageContext, storage: Storage, collectives: Collectives, end: WorkerChannel, scratch: Path
    ) -> None:
        self.context, self.storage, self.collectives, self.end, self.scratch = (
            context,
            storage,
            collectives,
            end,
            scratch,
        )
        self.started = time.monotonic()
        self.reported_at = 0.0
        self.first_step: int | None = None

    @property
    def first(self) -> bool:
        """Whether this worker has rank 0, which logs and writes."""
        return self.context.placement.rank == 0

    def log(self, line: str) -> None:
        """Log a line, on rank 0 only."""
        if self.first:
            self.end.send(f"{self.context.layout.title}: {line}")

    def progress(self, step: int, total: int, metrics: dict[str, float] | None = None) -> None:
        """Report that `step` of `total` parts are done: rank 0 does so at most twice a second, and at the end."""
        record_progress()
        self.first_step = step if self.first_step is None else self.first_step
        now = time.monotonic()
        if self.first and (now - self.reported_at >= REPORT_SECONDS or step >= total):
            self.reported_at = now
            self.end.send(self._progress(step, total, metrics))

    def stop_requested(self) -> bool:
        """Whether the driver has asked the stage to stop; False on ranks other than 0, which do not read it."""
        return self.first and self.end.stop_requested()

    def stop_together(self) -> None:
        """Stop if the driver has asked for it. Every worker calls this at the same point, after saving its work.

        Raises:
            Interrupted: the driver has asked to stop; raised on all workers.
        """
        if self.collectives.any(self.stop_requested()):
            raise Interrupted(f"{self.context.layout.title}: stopped; the finished work is kept")

    def result(self, write: Callable[[Path], object]) -> None:
        """Fill the stage's result directory by `write` and upload it. Called on rank 0."""
        directory = self.storage.local(self.context.layout.result) or self.scratch / "result"
        directory.mkdir(parents=True, exist_ok=True)
        write(directory)
        if not self.storage.is_local:
            self.storage.upload(directory, self.context.layout.result)

    def _progress(self, step: int, total: int, metrics: dict[str, float] | None) -> Progress:
        seconds = time.monotonic() - self.started
        since, used = step - (self.first_step or 0), self.context.placement.usage()
        return Progress(
            stage=self.context.layout.index,
            stages=len(self.context.run.job.spec.stages),
            title=self.context.layout.title,
            step=step,
            total=total,
            memory=used.peak,
            memory_reserved=used.reserved,
            memory_context=used.context,
            memory_nccl=used.nccl,
            seconds=seconds,
            eta=seconds / since * (total - step) if since else None,
            metrics=metrics,
        )
