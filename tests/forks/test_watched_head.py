"""A Ray head under KubeRay accepts jobs over HTTP with only the necessary parts of Ray's dashboard."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.cluster.operator_process import eventually
from support.cluster.servers import free_port

from finetune_trainer.forks import start
from finetune_trainer.runtime import quiet_environment

Json = dict[str, Any]


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[int, int]]:
    """Yield the dashboard's port and the process of `ray start`, in a short path because of its sockets."""
    dashboard = free_port()
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as directory:
        options = ["--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
        options += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={directory}"]
        options += ["--object-store-memory=80000000", "--disable-usage-stats"]
        own = {start.WATCHED_VARIABLE: start.HEAD, "RAY_AUTH_MODE": "disabled", **quiet_environment(accelerator=False)}
        command = [sys.executable, "-m", "finetune_trainer.forks.start", "start", *options]
        process = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            yield dashboard, process.pid
        finally:
            below = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            for child in below:
                child.kill()
            process.wait()


def call(port: int, path: str, body: Json | None = None) -> Json:
    """Return the answer of the dashboard, or an empty one if it is not ready."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/{path}", data=data)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: Json = json.loads(answer.read())
            return found
    except OSError:
        return {}


def test_a_job_is_taken_and_its_end_is_told(head: tuple[int, int]) -> None:
    port, pid = head
    eventually(lambda: call(port, "", {"entrypoint": "exit 3", "submission_id": "one"}), timeout=90, pause=0.5)
    eventually(lambda: call(port, "one").get("status") == "FAILED", timeout=60, pause=0.2)
    assert "exit code 3" in call(port, "one")["message"]
    assert sum("ray-dashboard-" in command for command in commands(pid)) == 2


def commands(pid: int) -> Iterator[str]:
    """Return the command lines of all descendants of a process."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            yield " ".join(child.cmdline())
