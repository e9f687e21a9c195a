"""The one line between a driver and the first worker: progress up, the wish to stop down.

A Ray actor on the driver's node, so that it works alike on one machine and across nodes. The worker sends without
waiting and reads the answer to its previous call: a slow driver never slows a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from finetune_trainer.progress.reporter import Progress


@dataclass
class Mail:
    """What the worker has said since the driver last looked."""

    lines: list[str] = field(default_factory=list)
    progress: Progress | None = None


class _Channel:
    def __init__(self) -> None:
        self._mail = Mail()
        self._stop = False

    def send(self, progress: Progress | None, line: str | None) -> bool:
        if progress is not None:
            self._mail.progress = progress
        if line is not None:
            self._mail.lines.append(line)
        return self._stop

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop

    def collect(self) -> Mail:
        mail, self._mail = self._mail, Mail()
        return mail


def open_channel() -> ActorHandle:
    """Start the actor. It needs no CPU of its own, and none of the libraries."""
    actor: Any = ray.remote(_Channel)
    return actor.options(num_cpus=0).remote()


class WorkerEnd:
    """The worker's side."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._answer: ray.ObjectRef | None = None
        self._stop = False

    def send(self, progress: Progress) -> None:
        """Send a step's progress, without waiting."""
        self.stop_requested()
        self._answer = self._channel.send.remote(progress, None)

    def log(self, line: str) -> None:
        """Send a line for people, without waiting."""
        self._channel.send.remote(None, line)

    def stop_requested(self) -> bool:
        """Whether the driver wants training to stop, as far as its last answer tells."""
        if self._answer is None:
            self._answer = self._channel.stopping.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = self._stop or bool(ray.get(ready[0]))
            self._answer = None
        return self._stop
