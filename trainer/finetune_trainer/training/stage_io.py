"""What a stage that takes no optimizer steps works with: storage, the other workers, the driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.errors import Interrupted
from finetune_trainer.heartbeat import beat
from finetune_trainer.progress.channel import WorkerEnd
from finetune_trainer.progress.reporter import Progress
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Peers
from finetune_trainer.training.context import StageContext

TELL_SECONDS = 0.5


class StageTools:
    """One worker's tools. Each worker has them; what only the first worker does is said below.

    Args:
        scratch: a directory of this stage's own on this machine.
    """

    def __init__(self, context: StageContext, storage: Storage, peers: Peers, end: WorkerEnd, scratch: Path) -> None:
        self.context, self.storage, self.peers, self.end, self.scratch = context, storage, peers, end, scratch
        self.started = time.monotonic()
        self.told = 0.0
        self.first_step: int | None = None

    @property
    def first(self) -> bool:
        """Whether this is the first worker, the one that speaks and writes."""
        return self.context.placement.rank == 0

    def log(self, line: str) -> None:
        """A line for people, from the first worker."""
        if self.first:
            self.end.send(f"{self.context.layout.title}: {line}")

    def progress(self, step: int, total: int, metrics: dict[str, float] | None = None) -> None:
        """So many of so many parts are done; the first worker tells it, at most twice a second and at the end."""
        beat()
        self.first_step = step if self.first_step is None else self.first_step
        now = time.monotonic()
        if self.first and (now - self.told >= TELL_SECONDS or step >= total):
            self.told = now
            self.end.send(self._progress(step, total, metrics))

    def stop_requested(self) -> bool:
        """Whether the driver wants the stage to stop. Only the first worker hears it."""
        return self.first and self.end.stop_requested()

    def stop_together(self) -> None:
        """Stop where the driver wants it; every worker calls this at the same places, what is done saved before.

        Raises:
            Interrupted: on all workers alike.
        """
        if self.peers.any(self.stop_requested()):
            raise Interrupted(f"{self.context.layout.title}: stopped; what is done is kept")

    def result(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill the stage's result directory, and bring it to storage. Called by the first worker."""
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
