"""Measures whether a process and its children work, by the kernel's counters: CPU time, bytes read and written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CPU_SHARE = 0.1
"""Minimum CPU time of a working process, as a fraction of one core. Ray's threads use about 0.01 in an idle worker."""
BYTES_PER_SECOND = 128 * 1024
"""Minimum I/O of a working process. Reading /proc takes a few KiB."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Activity:
    """Totals of a process and its children."""

    cpu: float
    """CPU time in seconds."""
    bytes: int
    """Bytes read and written by system calls on files."""

    def works_since(self, before: Activity, seconds: float) -> bool:
        """Whether the process has worked in the `seconds` since `before`. Children that have ended do not count."""
        cpu, transferred = self.cpu - before.cpu, self.bytes - before.bytes
        return cpu > CPU_SHARE * seconds or transferred > BYTES_PER_SECOND * seconds


def activity(pid: int | None = None) -> Activity:
    """Return the totals of a process, by default this one, and its descendants."""
    root = os.getpid() if pid is None else pid
    parts = [_own_activity(one) for one in [root, *children(root)]]
    return Activity(sum(part.cpu for part in parts), sum(part.bytes for part in parts))


def children(pid: int) -> list[int]:
    """Return the process ids of the descendants of a process, without scanning all processes."""
    found: list[int] = []
    for task in _listed(_PROC / str(pid) / "task"):
        for child in map(int, _read(task / "children").split()):
            found += [child, *children(child)]
    return found


def state(pid: int) -> str:
    """Return the state of a process in /proc/PID/stat: `R`, `S`, `D`, `T` or `Z`; empty if it has ended."""
    return _fields(pid)[0] if _fields(pid) else ""


def _own_activity(pid: int) -> Activity:
    fields = _fields(pid)
    cpu = sum(map(int, fields[11:15])) / _TICKS if fields else 0.0  # of the process and its children that have ended
    table = dict(line.split(": ") for line in _read(_PROC / str(pid) / "io").splitlines() if ": " in line)
    return Activity(cpu, int(table.get("rchar", 0)) + int(table.get("wchar", 0)))


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on. The name before them may contain spaces."""
    return _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended or belongs to another user
        return ""


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
