"""A job on two Ray nodes of this machine, each with its own processes and its own cache at the same path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster.servers import free_port

Job = dict[str, Any]
PROGRAM = Path(__file__).with_name("ray_node.py")
_NODE = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]


def require_namespaces() -> None:
    """Skip the test if this process may not create namespaces."""
    if shutil.which("unshare") is None or subprocess.run([*_NODE, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to make mount and PID namespaces")


@dataclass(frozen=True)
class Node:
    """A node: the path of its cache on this machine, and its processes."""

    cache: Path
    process: subprocess.Popen[str]


class TwoNodes:
    """Starts both nodes with `job`, whose files are in `directory`.

    Args:
        shared: whether both nodes have the same cache, as on a shared volume.
    """

    def __init__(self, job: Job, directory: Path, *, shared: bool = False, storage: str | None = None) -> None:
        self.directory, port = directory, str(free_port())
        mount = directory / "cache"
        mount.mkdir()
        root = f"{storage or directory / 'runs'}/{job['metadata']['name']}"
        run = {"job": job, "root": root, "baseDir": str(directory), "cacheDir": str(mount / "finetune")}
        (directory / "run.json").write_text(json.dumps(run))
        self.head = self._node("head", "one", mount, port)
        self.worker = self._node("worker", "one" if shared else "two", mount, port)

    def _node(self, role: str, name: str, mount: Path, port: str) -> Node:
        cache = self.directory / name
        cache.mkdir(exist_ok=True)
        program = [sys.executable, str(PROGRAM), role, str(self.directory / "run.json"), port]
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        command = [*_NODE, "sh", "-c", script, "sh", str(cache), str(mount), *program]
        own = {"HF_HOME": str(mount / "huggingface"), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled",
               "FINETUNE_NODE_NAME": name}  # fmt: skip
        with open(self.directory / f"{role}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=os.environ | own)
        return Node(cache, process)

    @property
    def output(self) -> str:
        """Return the driver's output so far."""
        return (self.directory / "head.log").read_text()

    def wait(self, seconds: float) -> int:
        """Return the job's exit code."""
        return self.head.process.wait(seconds)

    def close(self) -> None:
        """End all processes of both nodes."""
        for node in (self.head, self.worker):
            node.process.kill()
            node.process.wait()

    def __enter__(self) -> TwoNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
