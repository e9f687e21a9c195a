"""The channel between the driver and its workers: events, progress and heartbeats up, the stop request down.

The channel is a Ray actor on the driver's node, so that it works the same way on one machine and across nodes. A worker
sends without waiting and reads the stop request from the reply to an earlier call: a slow driver never slows a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_trainer.progress.heartbeats import WorkerHeartbeat
from finetune_trainer.progress.reporter import Progress


@dataclass(frozen=True)
class StageBegun:
    """Stage `index` begins or resumes from a checkpoint."""

    index: int
    workers: int
    """World size."""


@dataclass(frozen=True)
class StageDone:
    """Stage `index` is done, and its result is in storage."""

    index: int


@dataclass(frozen=True)
class CheckpointSaved:
    """Stage `index` has a complete checkpoint after `step` optimizer steps."""

    index: int
    step: int


@dataclass(frozen=True)
class Waiting:
    """A worker waits for storage. An empty text means that it no longer waits."""

    text: str


@dataclass(frozen=True)
class TransportFound:
    """The transport between the GPUs of several nodes, read from NCCL's log."""

    network: str
    gpu_direct: bool
    words: str
    warning: str = ""
    """Why the transport is slow, and the remedy. Empty if it is not slow."""


@dataclass(frozen=True)
class Placing:
    """Ray has no room for the workers yet. An empty text means that it has."""

    text: str


Event = str | Progress | StageBegun | StageDone | CheckpointSaved | Waiting | TransportFound | Placing
"""A log line, the progress of a step, a checkpoint, a change of stage, a wait, or the transport between GPUs."""


@dataclass
class _Channel:
    events: list[Event] = field(default_factory=list)
    stop: bool = False
    latest: dict[int, WorkerHeartbeat] = field(default_factory=dict)
    """The latest heartbeat of each worker, by rank."""

    def heartbeat(self, heartbeat: WorkerHeartbeat) -> None:
        self.latest[heartbeat.rank] = heartbeat

    def heartbeats(self) -> dict[int, WorkerHeartbeat]:
        return self.latest

    def send(self, event: Event) -> None:
        # Consecutive progress events collapse into the newest, so that a slow driver reads few events.
        if isinstance(event, Progress) and self.events and isinstance(self.events[-1], Progress):
            self.events.pop()
        self.events.append(event)

    def request_stop(self) -> None:
        self.stop = True

    def stop_requested(self) -> bool:
        return self.stop

    def collect(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def open_channel() -> ActorHandle[Any]:
    """Start the channel's actor on this node and return its handle.

    The actor is pinned to this node, so that it survives the loss of any other. It needs no CPU of its own.
    """
    actor: Any = ray.remote(_Channel)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    handle: ActorHandle[Any] = actor.options(num_cpus=0, scheduling_strategy=here).remote()
    return handle


class WorkerChannel:
    """The worker's end of the channel."""

    def __init__(self, channel: ActorHandle[Any]) -> None:
        self._channel = channel
        self._reply: ray.ObjectRef[Any] | None = None
        self._stop = False

    def send(self, event: Event) -> None:
        """Send an event to the driver, without waiting."""
        self._channel.send.remote(event)

    def heartbeat(self, heartbeat: WorkerHeartbeat) -> None:
        """Send this worker's heartbeat to the driver, without waiting."""
        self._channel.heartbeat.remote(heartbeat)

    def stop_requested(self) -> bool:
        """Whether the driver has asked the workers to stop, according to its latest reply."""
        if self._reply is None:
            self._reply = self._channel.stop_requested.remote()
        ready, _ = ray.wait([self._reply], timeout=0)
        if ready:
            self._stop = self._stop or bool(ray.get(ready[0]))
            self._reply = None
        return self._stop
