"""Read the last collective operations of another process from torch's flight recorder.

torch keeps the newest operations of each process group, with NCCL and with gloo (`TORCH_FR_BUFFER_SIZE`). A C++ server
of torch, which `torch.distributed.debug` uses, serves them at a Unix socket. It needs neither the GIL nor the training
thread, so a worker responds while it hangs in a collective.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANDLERS = ("fr_trace_json", "dump_nccl_trace_json")
"""torch's names for the records of gloo and of NCCL; a build without CUDA has only the first."""
ANSWER_SECONDS = 5.0
UNNAMED = ("", "undefined")
Json = dict[str, Any]
log = logging.getLogger(__name__)
_servers: list[Any] = []
"""References to the servers: a server ends when its Python object is deleted."""


@dataclass(frozen=True)
class Collective:
    """The newest operation of one process group of one process."""

    group: str
    """Name of the process group: the same in all of its processes."""
    number: int
    """Sequence number of the operation in its group."""
    finished: bool
    words: str
    """Readable text with the operation's name, number, sizes and state."""


def answer_questions(path: Path) -> None:
    """Serve this process's flight recorder to other processes of this user at a Unix socket.

    If that fails (the path is too long, the disk is full), a warning is logged and training is not affected.
    """
    from torch._C._distributed_c10d import _WorkerServer

    while _servers:
        _servers.pop().shutdown()
    try:
        path.unlink(missing_ok=True)  # an ended process had the same id
        _servers.append(_WorkerServer(str(path)))
    except (OSError, RuntimeError) as error:
        log.warning("this process cannot show its collective operations: %s", error)


def last_collectives(path: Path, now: float | None = None) -> list[Collective]:
    """Return the newest operation of each process group of the process that serves a socket.

    Empty if it does not respond within `ANSWER_SECONDS`, or has no operations.

    Args:
        now: seconds since the epoch. Default: the clock of this machine.
    """
    entries = [entry for handler in HANDLERS for entry in _entries(path, handler)]
    return newest(entries, time.time() if now is None else now)


def newest(entries: Iterable[Json], now: float) -> list[Collective]:
    """Return the newest operation of each group, unfinished ones first.

    Args:
        entries: entries of the flight recorder's dump, version 2 (`FlightRecorder.hpp`).
        now: seconds since the epoch.
    """
    last = {entry["process_group"][0]: entry for entry in sorted(entries, key=lambda one: int(one["record_id"]))}
    found = [_collective(entry, now) for entry in last.values()]
    return sorted(found, key=lambda one: one.finished)


def behind(found: dict[int, list[Collective]]) -> int | None:
    """Return the rank with the fewest operations in a group in which a rank waits; None if all have equally many.

    Args:
        found: newest operations by rank. Only groups of all these ranks are compared.
    """
    groups = [{one.group: one for one in some} for some in found.values()]
    for group in [name for name in groups[0] if all(name in one for one in groups)] if groups else []:
        numbers = {rank: one.number for rank, some in found.items() for one in some if one.group == group}
        waits = any(one.group == group and not one.finished for some in found.values() for one in some)
        if waits and len(set(numbers.values())) > 1:
            return min(numbers, key=lambda rank: numbers[rank])
    return None


def _collective(entry: Json, now: float) -> Collective:
    group, description = entry["process_group"]
    number = int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"])
    finished = bool(entry["retired"]) or entry["state"] == "completed"
    sizes = ", ".join(f"{kind} {size}" for kind, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False))
    seconds = now - entry["time_created_ns"] / 1e9
    state = "finished" if finished else f"not finished ({entry['state']})"
    name = f"group {group}" + ("" if description in UNNAMED else f" ({description})")
    words = f"{entry['profiling_name']}, number {number} of {name}, {sizes or 'no tensor'}: {state}, "
    return Collective(group, number, finished, f"{words}begun {seconds:.0f} s ago")


def _entries(path: Path, handler: str) -> list[Json]:
    connection = _UnixConnection(path)
    try:
        connection.request("POST", f"/handler/{handler}")
        answer = connection.getresponse()
        found: Json = json.loads(answer.read()) if answer.status == http.client.OK else {}
        return list(found.get("entries", []))
    except (OSError, ValueError, http.client.HTTPException):
        return []
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
