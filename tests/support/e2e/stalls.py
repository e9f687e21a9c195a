"""Faults that stall the workers of a job on real pods, each with a function that undoes it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from support.e2e import cgroups
from support.e2e.cluster_jobs import RUNS, long_job
from support.e2e.faults import WORKER, Victim
from support.e2e.following import Following

Json = dict[str, Any]
TIMEOUT = 20
"""`runPolicy.stallTimeout` of the job, in seconds."""
NOTICE_SECONDS, END_SECONDS, CALM_SECONDS = 2 * TIMEOUT, 180, 60
SAVE = 20
"""Steps between two checkpoints."""
STILL_SECONDS, LOOK_SECONDS = TIMEOUT / 4, 0.2
_NOWHERE = "02:00:00:00:00:01"
"""A hardware address that no interface has."""
_MORE = 5
"""Steps that a worker may still make after its loader stopped, because it has already loaded their rows."""


def stall_job(name: str, template: Json, *, steps: int, save: int = SAVE) -> Json:
    """Return a long job of two pods whose rows are loaded by separate processes."""
    body = long_job(name, template, steps=steps, save=save)
    body["spec"]["stages"][1]["pretrain"]["dataloaderNumWorkers"] = 1
    # Several rounds may fall between two checkpoints, so that the backoff count is not reset.
    body["spec"]["runPolicy"] = {"stallTimeout": TIMEOUT, "backoffLimit": 20}
    # A node has room for both pods, because the avoided node may be the node of either pod.
    body["spec"]["resources"] |= {"memoryPerNode": "5Gi", "cpusPerNode": "500m"}
    return body


@dataclass(frozen=True)
class Struck:
    """A stall that was injected."""

    at: float
    """When the stall began, in seconds of this process's clock, after prefetched rows and steps until a save."""
    behind: str
    """The worker that the status must name as the one behind."""
    undo: Callable[[], None]


def stopped_worker(victim: Victim) -> Struck:
    """Stop one worker with SIGSTOP; it is killed later, so there is nothing to undo."""
    pod, worker = _worker(victim)
    os.kill(worker, signal.SIGSTOP)
    return Struck(time.monotonic(), f"{_name_of(pod, worker)}: ", _nothing)


def sleeping_loader(victim: Victim) -> Struck:
    """Stop the process that loads a worker's rows.

    Repeat that while training continues: a loader that has loaded the last rows of its epoch has no more work.
    """
    pod, worker = _worker(victim)
    while True:
        at, step = time.monotonic(), victim.following.samples[-1].step
        for child in psutil.Process(worker).children():
            child.send_signal(signal.SIGSTOP)
        still = _still_since(victim, at)
        if victim.following.samples[-1].step <= step + _MORE:
            return Struck(still, _name_of(pod, worker), _nothing)


def hanging_store(victim: Victim) -> Struck:
    """Make the store accept connections without an answer; each worker uploads its part of a checkpoint."""
    server, at = victim.s3.process, time.monotonic()
    server.suspend()
    return Struck(_still_since(victim, at), "behind is worker ", server.resume)


def dead_network(victim: Victim) -> Struck:
    """Drop all packets between the two pods of the attempt; both reach everything else."""
    pods = victim.pods()
    other = pods[1]["status"]["podIP"]
    pid = _processes(pods[0], "finetune")[0]
    # The entry is removed with the pod's network namespace at the end of the attempt.
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "neigh", "replace", other, "lladdr", _NOWHERE]
    subprocess.run([*command, "dev", "eth0", "nud", "permanent"], check=True)
    return Struck(time.monotonic(), "behind is worker ", _nothing)


STALLS: dict[str, Callable[[Victim], Struck]] = {
    "stopped-worker": stopped_worker,
    "sleeping-loader": sleeping_loader,
    "hanging-store": hanging_store,
    "dead-network": dead_network,
}


@dataclass(frozen=True)
class StallRound:
    """One stall: the job's messages, and the durations."""

    kind: str
    step: int
    noticed: float
    """Seconds until the status had the condition `Stalled`."""
    trained: float
    """Seconds until the first new step after a restart."""
    message: str
    reason: str
    """The failure reason of the attempt."""
    stacks: list[str]
    """The stack reports in storage."""


def strike(victim: Victim, kind: str) -> StallRound:
    """Inject a stall, and follow it until training continues and the status is healthy again.

    A store that hangs does so until the attempt has ended.

    Raises:
        AssertionError: it is noticed or reported too late, or training does not continue.
    """
    following = victim.following
    attempt, step = int(following.status["attempt"]), following.samples[-1].step
    struck = STALLS[kind](victim)
    try:
        following.until(_stalled, struck.at + NOTICE_SECONDS - time.monotonic(), f"{kind} is noticed")
        noticed = time.monotonic() - struck.at
        following.until(lambda it: _ended(it, attempt) is not None, END_SECONDS, "the attempt's end")
    finally:
        struck.undo()
    record = _ended(following, attempt)
    assert record is not None
    assert record["reason"] == "Stalled" and struck.behind in record["message"], (struck, record)
    victim.goes_on(struck.at)
    following.until(lambda it: not _stalled(it), CALM_SECONDS, "the condition Stalled is taken back")
    found = following.recovery(struck.at)
    assert found is not None and found.repeated <= SAVE, found
    return StallRound(kind, step, round(noticed, 1), round(found.seconds, 1), record["message"], record["reason"],
                      _stacks(victim, attempt))  # fmt: skip


def _still_since(victim: Victim, at: float) -> float:
    """Wait until there have been no steps for a while; return the time of the last one, at least `at`.

    There is no event for missing steps, so this polls.
    """
    following = victim.following
    while time.monotonic() - (last := max(at, following.samples[-1].at)) < STILL_SECONDS:
        time.sleep(LOOK_SECONDS)
    return last


def _stacks(victim: Victim, attempt: int) -> list[str]:
    victim.s3.fs.invalidate_cache()
    place = f"{RUNS}/{victim.namespace}/{victim.name}/stalls/attempt-{attempt}-*.txt"
    return [victim.s3.fs.cat_file(path).decode() for path in victim.s3.fs.glob(place)]


def _stalled(following: Following) -> bool:
    conditions = following.status.get("conditions") or []
    return any(item["type"] == "Stalled" and item["status"] == "True" for item in conditions)


def _ended(following: Following, attempt: int) -> Json | None:
    """Return the record of an attempt that has ended."""
    records = following.status.get("attempts") or []
    return next((one for one in records if one["number"] == attempt and "endTime" in one), None)


def _worker(victim: Victim) -> tuple[Json, int]:
    """Return a random pod of the attempt and its worker, without loaders, which have the same command line."""
    pod = victim.chance.choice(victim.pods())
    found = _processes(pod, WORKER)
    return pod, next(pid for pid in found if psutil.Process(pid).ppid() not in found)


def _name_of(pod: Json, pid: int) -> str:
    """Return the name of a worker in stall messages by its process id on this host, without its rank."""
    status = Path(f"/proc/{pid}/status").read_text()
    inside = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
    return f"on node {pod['spec']['nodeName']} (process {inside})"


def _processes(pod: Json, words: str) -> list[int]:
    pids = cgroups.processes(pod["metadata"]["uid"])
    found = [pid for pid in pids if words in cgroups.command_of(pid) and Path(f"/proc/{pid}").exists()]
    assert found, f"no process {words!r} in pod {pod['metadata']['name']}"
    return found


def _nothing() -> None:
    """Undo nothing."""
