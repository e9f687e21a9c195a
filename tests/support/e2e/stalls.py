"""What makes the workers of a job hang on real pods: each one as something that is done to it, and undone."""

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
"""So many steps a worker may still make whose loader sleeps: it has loaded their rows before."""


def stall_job(name: str, template: Json, *, steps: int, save: int = SAVE) -> Json:
    """A long job of two pods whose rows are loaded by processes of their own."""
    body = long_job(name, template, steps=steps, save=save)
    body["spec"]["stages"][1]["pretrain"]["dataloaderNumWorkers"] = 1
    # Rounds may follow each other without a new checkpoint in between, which would set the count of failures back.
    body["spec"]["runPolicy"] = {"stallTimeout": TIMEOUT, "backoffLimit": 20}
    # A node has room for both pods: the one that is avoided may be the node of either.
    body["spec"]["resources"] |= {"memoryPerNode": "5Gi", "cpusPerNode": "500m"}
    return body


@dataclass(frozen=True)
class Struck:
    """A stall that was brought about."""

    at: float
    """When it began, in seconds of this process's clock: rows that are loaded, and steps until a save, come first."""
    behind: str
    """What the status must say of the worker that is behind."""
    undo: Callable[[], None]


def stopped_worker(victim: Victim) -> Struck:
    """SIGSTOP of one worker. It is ended, so nothing is to be undone."""
    pod, worker = _worker(victim)
    os.kill(worker, signal.SIGSTOP)
    return Struck(time.monotonic(), f"{_name_of(pod, worker)}: ", _nothing)


def sleeping_loader(victim: Victim) -> Struck:
    """The process that loads a worker's rows sleeps.

    Done again where training goes on: a loader that has loaded the last rows of its epoch has nothing more to do.
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
    """The store accepts connections and answers none. Each worker uploads its own part of a checkpoint."""
    server, at = victim.s3.process, time.monotonic()
    server.suspend()
    return Struck(_still_since(victim, at), "behind is worker ", server.resume)


def dead_network(victim: Victim) -> Struck:
    """No packet gets from one pod of the attempt to the other one; both reach everything else."""
    pods = victim.pods()
    other = pods[1]["status"]["podIP"]
    pid = _processes(pods[0], "finetune")[0]
    # The entry goes with the pod's network namespace, and the attempt's pods go as it ends.
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
    """One stall: what the job said, and how long it took."""

    kind: str
    step: int
    noticed: float
    """Seconds until the status had the condition `Stalled`."""
    trained: float
    """Seconds until there was a new step, after a restart."""
    message: str
    reason: str
    """Why the attempt ended."""
    stacks: list[str]
    """What is in storage of it."""


def strike(victim: Victim, kind: str) -> StallRound:
    """Bring a stall about, and follow it until training goes on and the status says so.

    A store that hangs does so until the attempt has ended.

    Raises:
        AssertionError: it is noticed too late, or not told, or training does not go on.
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
    """Wait until there have been no steps for a while; return since when, `at` the earliest.

    There is no event for steps that do not come.
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
    """The record of an attempt that has ended."""
    records = following.status.get("attempts") or []
    return next((one for one in records if one["number"] == attempt and "endTime" in one), None)


def _worker(victim: Victim) -> tuple[Json, int]:
    """A pod of the attempt by chance and its worker; not one of its loaders, which have the same command line."""
    pod = victim.chance.choice(victim.pods())
    found = _processes(pod, WORKER)
    return pod, next(pid for pid in found if psutil.Process(pid).ppid() not in found)


def _name_of(pod: Json, pid: int) -> str:
    """How a stall names the worker that has this process id on this host; its rank is not known here."""
    status = Path(f"/proc/{pid}/status").read_text()
    inside = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
    return f"on node {pod['spec']['nodeName']} (process {inside})"


def _processes(pod: Json, words: str) -> list[int]:
    pids = cgroups.processes(pod["metadata"]["uid"])
    found = [pid for pid in pids if words in cgroups.command_of(pid) and Path(f"/proc/{pid}").exists()]
    assert found, f"no process {words!r} in pod {pod['metadata']['name']}"
    return found


def _nothing() -> None:
    """Nothing is left of it."""
