"""Diagnose a stall: collect the stacks of all workers, name the one that is behind, and kill the workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_api.redact import redact
from finetune_trainer.launch.flight_recorder import behind
from finetune_trainer.launch.stack_dumps import Stacks, collect, kill
from finetune_trainer.launch.stall_watch import Stall
from finetune_trainer.layout import stall_record
from finetune_trainer.progress.heartbeats import WorkerHeartbeat
from finetune_trainer.storage.filesystem import Storage

ASK_SECONDS = 30.0
"""A node that has not responded within this time counts as unreachable."""
WRITE_SECONDS = 10.0
"""Timeout of a write to storage, which may itself be the cause of the stall."""


class Stalled(Exception):
    """The workers made no progress and were killed."""


@dataclass(frozen=True)
class Finding:
    """The result of a diagnosis: which worker is behind, and why."""

    text: str
    host: str | None
    """Name of the worker's node; None if no worker is known to be behind."""


def inquire(stall: Stall, report: Callable[[str], None]) -> Finding:
    """Collect and report the stacks of all workers; return which worker is behind.

    Args:
        stall: the stall.
        report: receives the full record, with stacks.
    """
    found = _everywhere(stall, collect)
    report(record(stall, found))
    rank = culprit(stall, found)
    beat = stall.beats.get(rank)
    why = f": {_condition(beat, found)}" if beat is not None and _condition(beat, found) else ""
    text = f"no progress for {stall.seconds:.0f} s; behind is {stall.words(rank)}{why}"
    return Finding(text, beat.host if beat is not None else None)


def culprit(stall: Stall, found: dict[int, Stacks]) -> int:
    """Return the rank that is behind: a worker that cannot run at all, else the one with the least progress.

    If all are in the same phase of the same step, it is the one that started the fewest collective operations.

    Args:
        stall: the stall.
        found: stacks by rank; workers whose nodes do not respond are missing.
    """
    broken = [rank for rank, beat in stall.beats.items() if _condition(beat, found)]
    if len(broken) not in (0, stall.workers):
        return broken[0]
    places = {(beat.phase.step, beat.phase.order) for beat in stall.beats.values()}
    late = behind({rank: list(one.last) for rank, one in found.items()}) if len(places) == 1 else None
    return stall.culprit if late is None or len(found) < stall.workers else late


def record(stall: Stall, found: dict[int, Stacks]) -> str:
    """Return the full record of a stall as text, with secrets removed."""
    lines = [f"no progress for {stall.seconds:.0f} s; the last operation of each worker:"]
    lines += [stall.words(rank) for rank in range(stall.workers)]
    for rank, beat in sorted(stall.beats.items()):
        lines += ["", f"--- worker {rank}{f', {_condition(beat, found)}' if _condition(beat, found) else ''}"]
        if rank in found:
            lines.append(found[rank].text.rstrip())
    return redact("\n".join(lines))


def end_workers(stall: Stall) -> None:
    """Kill the workers' processes on all nodes that respond."""
    _everywhere(stall, kill)


def keep(storage: Storage, attempt: int, text: str) -> None:
    """Write a record to storage, unless storage does not respond in time."""
    place = stall_record(attempt, time.strftime("%Y%m%d-%H%M%S"))

    def write() -> None:
        with suppress(OSError):
            storage.write_text(place, text)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(WRITE_SECONDS)


def _condition(beat: WorkerHeartbeat, found: dict[int, Stacks]) -> str:
    """Return why a worker cannot continue; empty if it is alive."""
    if beat.rank not in found:
        return f"node {beat.host} does not answer"
    return found[beat.rank].told


def _everywhere(stall: Stall, work: Callable[[list[int]], Any]) -> dict[int, Any]:
    """Call `work` on each worker's node with the ids of its processes, and return its results by rank."""
    nodes: dict[str, dict[int, int]] = {}
    for beat in stall.beats.values():
        nodes.setdefault(beat.node, {})[beat.pid] = beat.rank
    here = ray.get_runtime_context().get_node_id()
    asked = {node: _remotely(node, work, list(pids)) for node, pids in nodes.items() if node != here}
    answers = {here: work(list(nodes[here]))} if here in nodes else {}
    deadline = time.monotonic() + ASK_SECONDS
    for node, answer in asked.items():
        ready, _ = ray.wait([answer], timeout=max(deadline - time.monotonic(), 0))
        with suppress(ray.exceptions.RayError):  # the node is lost
            answers |= {node: ray.get(ready[0])} if ready else {}
    return {nodes[node][pid]: one for node, answer in answers.items() if answer for pid, one in answer.items()}


def _remotely(node: str, work: Callable[[list[int]], Any], pids: list[int]) -> Any:
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(pids)
