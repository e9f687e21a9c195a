"""The one line between a driver and the first worker: events and progress up, the wish to stop down.

A Ray actor on the driver's node, so that it works alike on one machine and across nodes. The worker sends without
waiting, and reads whether to stop from the answer to an earlier call: a slow driver never slows a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_trainer.progress.heartbeats import Beat
from finetune_trainer.progress.reporter import Progress


@dataclass(frozen=True)
class StageBegun:
    """Stage `index` begins, or goes on from a checkpoint, with so many workers."""

    index: int
    workers: int


@dataclass(frozen=True)
class StageDone:
    """Stage `index` is done and its result is in storage."""

    index: int


@dataclass(frozen=True)
class CheckpointSaved:
    """Stage `index` has a complete checkpoint after `step` optimizer steps."""

    index: int
    step: int


@dataclass(frozen=True)
class Waiting:
    """A worker waits for storage; with an empty text, it need not any more."""

    text: str


@dataclass(frozen=True)
class TransportFound:
    """How the GPUs of several nodes reach each other, by NCCL's log."""

    network: str
    gpu_direct: bool
    words: str
    warning: str = ""
    """What makes it slow, and the remedy; empty where nothing does."""


@dataclass(frozen=True)
class Placing:
    """Ray has no room for the workers yet; with an empty text, it has."""

    text: str


Event = str | Progress | StageBegun | StageDone | CheckpointSaved | Waiting | TransportFound | Placing
"""A line for people, a step's progress, a checkpoint, a change of stage, a wait, or the GPUs' transport."""


@dataclass
class _Channel:
    events: list[Event] = field(default_factory=list)
    stop_wanted: bool = False
    pulses: dict[int, Beat] = field(default_factory=dict)

    def beat(self, beat: Beat) -> None:
        self.pulses[beat.rank] = beat

    def beats(self) -> dict[int, Beat]:
        return self.pulses

    def send(self, event: Event) -> None:
        # Of progress only the newest counts, so that a driver that listens seldom gets little.
        if isinstance(event, Progress) and self.events and isinstance(self.events[-1], Progress):
            self.events.pop()
        self.events.append(event)

    def stop(self) -> None:
        self.stop_wanted = True

    def stopping(self) -> bool:
        return self.stop_wanted

    def collect(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def open_channel() -> ActorHandle:
    """Start the actor on this node, so that another node's loss never takes it along. It needs no CPU of its own."""
    actor: Any = ray.remote(_Channel)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


class WorkerEnd:
    """The worker's side."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._answer: ray.ObjectRef | None = None
        self._stop = False

    def send(self, event: Event) -> None:
        """Tell the driver, without waiting."""
        self._channel.send.remote(event)

    def beat(self, beat: Beat) -> None:
        """Tell the driver how this worker stands, without waiting."""
        self._channel.beat.remote(beat)

    def stop_requested(self) -> bool:
        """Whether the driver wants training to stop, as far as its last answer tells."""
        if self._answer is None:
            self._answer = self._channel.stopping.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            self._stop = self._stop or bool(ray.get(ready[0]))
            self._answer = None
        return self._stop
