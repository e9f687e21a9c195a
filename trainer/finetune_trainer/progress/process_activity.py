"""Whether this process and its children work, by the kernel's own accounts: CPU time, bytes read and written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CPU_SHARE = 0.1
"""Of one core. Idle, a worker's threads (Ray's) take about a hundredth."""
BYTES_PER_SECOND = 128 * 1024
"""Looking at /proc costs a few KiB."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Activity:
    """Totals of a process and its children."""

    cpu: float
    """Seconds."""
    bytes: int
    """Read and written by system calls on files."""

    def works_since(self, before: Activity, seconds: float) -> bool:
        """Whether it worked in the `seconds` between two looks. A child that has ended takes its account along."""
        cpu, transferred = self.cpu - before.cpu, self.bytes - before.bytes
        return cpu > CPU_SHARE * seconds or transferred > BYTES_PER_SECOND * seconds


def activity(pid: int | None = None) -> Activity:
    """Return the totals of a process, this one by default, and of its descendants."""
    first = os.getpid() if pid is None else pid
    found = [_of(one) for one in [first, *children(first)]]
    return Activity(sum(one.cpu for one in found), sum(one.bytes for one in found))


def children(pid: int) -> list[int]:
    """Return the descendants of a process, without a scan of all processes."""
    found: list[int] = []
    for task in _listed(_PROC / str(pid) / "task"):
        for child in map(int, _read(task / "children").split()):
            found += [child, *children(child)]
    return found


def state(pid: int) -> str:
    """Return a process's state as /proc/PID/stat has it: `R`, `S`, `D`, `T`, `Z`; empty where it has ended."""
    return _fields(pid)[0] if _fields(pid) else ""


def _of(pid: int) -> Activity:
    fields = _fields(pid)
    cpu = sum(map(int, fields[11:15])) / _TICKS if fields else 0.0  # its own and its ended children's
    table = dict(line.split(": ") for line in _read(_PROC / str(pid) / "io").splitlines() if ": " in line)
    return Activity(cpu, int(table.get("rchar", 0)) + int(table.get("wchar", 0)))


def _fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before them may hold spaces."""
    return _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended, or is another user's
        return ""


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
