"""A cgroup for each node in every hierarchy of this machine (v1 and v2), the parent of its pods' cgroups."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PARENT = "finetune-e2e"
REMOVE_SECONDS = 20


def hierarchies() -> list[Path]:
    """Return the mounted hierarchies: one with v2, one per controller with v1, some under two names."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in sorted(ROOT.iterdir()) if path.is_dir() and not path.is_symlink()]


def make(name: str) -> str:
    """Create `/finetune-e2e/<name>` and return its path in the format of the kubelet."""
    for root in hierarchies():
        for path in (root / PARENT, root / PARENT / name):
            path.mkdir(exist_ok=True)
            _inherit(path)
    return f"/{PARENT}/{name}"


def _inherit(path: Path) -> None:
    """Set what a child does not inherit: controllers (v2), or CPUs and memory nodes (v1)."""
    controllers = path.parent / "cgroup.controllers"
    if controllers.exists():
        wanted = " ".join(f"+{name}" for name in controllers.read_text().split())
        (path.parent / "cgroup.subtree_control").write_text(wanted)
    for kind in ("cpuset.cpus", "cpuset.mems"):
        if (path / kind).exists() and not controllers.exists() and not (path / kind).read_text().strip():
            (path / kind).write_text((path.parent / kind).read_text())


def remove(name: str = "") -> None:
    """Remove the cgroup and all below it once its processes have ended, if it exists.

    Raises:
        AssertionError: some processes are still alive.
    """
    deadline = time.monotonic() + REMOVE_SECONDS
    for root in hierarchies():
        top = root / PARENT / name
        while top.exists() and not _removed(top):
            assert time.monotonic() < deadline, f"{top} is in use"
            time.sleep(0.05)  # the kernel has no event for the end of the last process


def _removed(top: Path) -> bool:
    try:
        for path in sorted((path for path in top.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts)):
            path.rmdir()
        top.rmdir()
    except OSError:
        return not top.exists()
    return True


def processes(uid: str) -> list[int]:
    """Return the process ids on this host of all containers of the pod with that uid."""
    marks = (uid, uid.replace("-", "_"))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                text = (entry / "cgroup").read_text()
            except OSError:
                continue
            if any(mark in text for mark in marks):
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process, or an empty one if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def exhaust_memory(pid: int) -> None:
    """Fill the memory cgroup of a process until the kernel kills a process in it, first this one.

    Raises:
        AssertionError: it is still alive, because the group has no limit.
    """
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    group = next(line.partition("::" if line.startswith("0::") else ":memory:")[2] for line in lines if _counts(line))
    place = ROOT / group.lstrip("/") if hierarchies() == [ROOT] else ROOT / "memory" / group.lstrip("/")
    done = subprocess.run([sys.executable, "-c", _HOG, str(place / "cgroup.procs"), str(pid)], timeout=60)
    assert done.returncode in (0, -9), f"process {pid} is still there"


def _counts(line: str) -> bool:
    return ":memory:" in line or (line.startswith("0::") and hierarchies() == [ROOT])


_HOG = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
held = []
while os.path.exists(f"/proc/{sys.argv[2]}/exe") and len(held) < 2000:
    held.append(bytearray(os.urandom(1) * (8 << 20)))
sys.exit(len(held) >= 2000)
"""
