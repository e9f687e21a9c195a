"""The trainer's image as a root folder, without a registry and a container runtime.

Its files are those of the Debian packages that `images/Dockerfile` installs, with their dependencies, copied from this
machine; Python and its packages are this machine's. Files of other packages are absent.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from support.e2e.images import ROOT, interpreter, libraries_of

DOCKERFILE = ROOT / "images" / "Dockerfile"
BASE = ("libc6", "libc-bin", "libstdc++6", "zlib1g")
"""Packages of any Debian image of Python: a C library, ldconfig, and the libraries that Triton links with."""
MERGED = ("bin", "sbin", "lib", "lib64")


def packages_of(stage: str) -> list[str]:
    """Return the Debian packages that a stage of the Dockerfile installs."""
    text = DOCKERFILE.read_text().partition(f"\nFROM base AS {stage}\n")[2].partition("\nFROM ")[0]
    installed = re.findall(r"apt-get install (.*?)(?:&&|$)", text.replace("\\\n", " "), re.MULTILINE)
    return [word for words in installed for word in words.split() if not word.startswith("-")]


def missing_packages(packages: Iterable[str]) -> str:
    """Return why this machine cannot make such a root, or an empty text."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "needs root and unshare, to change root"
    if shutil.which("dpkg-query") is None:
        return "needs Debian's package files"
    absent = [name for name in (*BASE, *packages) if name not in _installed()]
    return f"needs the Debian packages {', '.join(absent)}" if absent else ""


def make_root(root: Path, packages: Iterable[str]) -> Path:
    """Create a root with packages and the libraries that Python needs."""
    (root / "usr").mkdir(parents=True)
    for name in MERGED:
        (root / "usr" / name).mkdir()
        (root / name).symlink_to(f"usr/{name}")
    for name in ("tmp", "dev", "proc"):
        (root / name).mkdir()
    for path in map(Path, _files(sorted(_with_dependencies([*BASE, *packages])))):
        if (path.is_file() or path.is_symlink()) and "/share/" not in str(path):
            _put(root, path)
    for place, source in libraries_of(_programs()).items():
        _put(root, Path(place), source)
    return root


def run_inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, with this machine's Python and this repository mounted at their paths.

    The mounts are in a separate namespace, which ends with the command.
    """
    mounts = [str(interpreter()), str(ROOT), str(Path(sys.prefix).resolve()), "/dev"]
    binds = " && ".join(f"mkdir -p {root}{path} && mount --rbind {path} {root}{path}" for path in dict.fromkeys(mounts))
    shell = f'{binds} && exec chroot {root} "$@"'
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
    whole = ["unshare", "--mount", "sh", "-c", shell, "sh", *command]
    environment = {"PATH": path, "LANG": "C.UTF-8", "HOME": "/tmp"}
    return subprocess.run(whole, capture_output=True, text=True, timeout=120, env=environment)


def _with_dependencies(names: Iterable[str]) -> set[str]:
    """Return packages with dependencies: the first installed alternative each, and no recommended packages."""
    depends = _installed()
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for alternatives in depends[name].split(","):
            options = [re.split(r"[ (:]", option.strip())[0] for option in alternatives.split("|")]
            todo += [option for option in options if option in depends][:1]
    return found


@cache
def _installed() -> dict[str, str]:
    """Return the dependencies of each installed package from its control file."""
    form = "${Package}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\n"
    lines = subprocess.run(["dpkg-query", "--show", f"--showformat={form}"], capture_output=True, text=True).stdout
    rows = (line.split("\t") for line in lines.splitlines())
    return {name: depends for name, status, depends in rows if status == "installed"}


def _files(names: Iterable[str]) -> list[str]:
    return subprocess.run(["dpkg-query", "--listfiles", *names], capture_output=True, text=True).stdout.splitlines()


def _programs() -> list[Path]:
    python = interpreter()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [python / "bin" / version, *(python / "lib" / version).rglob("*.so")]


def _put(root: Path, place: Path, source: Path | None = None) -> None:
    """Copy a file to its path in the root; keep an existing file."""
    target = root / str(place).lstrip("/")
    if target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source or place, target, follow_symlinks=source is not None)
