"""Returns the host memory that a process may use. Does not import torch, because every node's process calls it."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

_UNLIMITED = 1 << 60  # cgroup v1 writes about 2^63 if there is no limit


def host_memory() -> int:
    """Return the bytes available to this process and its children: free memory or the cgroup's limit, if lower."""
    return min([int(psutil.virtual_memory().available), *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Return the limits of this process's cgroup and all its ancestors, v1 and v2."""
    limits = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        root, file = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            root, file = root / "memory", "memory.limit_in_bytes"
        own = root / group.lstrip("/")
        limits += [_read(directory / file) for directory in (own, *own.parents) if directory.is_relative_to(root)]
    return [int(limit) for limit in limits if limit.strip().isdigit() and int(limit) < _UNLIMITED]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
