"""Its parent process stops the driver by a signal, with and without the fork server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetune_api.exit_codes import ExitCode
from finetune_api.report import AttemptReport
from finetune_trainer.forks import client, wire

TIMEOUT = 2
NODE = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from finetune_trainer.launch import drive, node
drive.TERMINATION_LOG, node._DRIVE = Path(sys.argv[2]), Path(sys.argv[1])
policy = SimpleNamespace(stall_timeout={TIMEOUT})
run = SimpleNamespace(job=SimpleNamespace(spec=SimpleNamespace(run_policy=policy)))
sys.exit(node._drive(run, Path("run.json")))
"""
DRIVER = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), flush=True)
while True: signal.pause()
"""


@pytest.fixture(params=["fork", "child"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start the driver with or without the fork server."""
    if request.param == "child":
        monkeypatch.delenv(wire.SOCKET_VARIABLE, raising=False)
        yield request.param
        return
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    with client.fork_server(["json"], []):
        yield request.param


@pytest.fixture
def node(way: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Start the first process of a pod and its driver."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-c", NODE, str(tmp_path / "driver.py"), str(tmp_path / "last-word")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        driver = psutil.Process(int(first.stdout.readline()))
        yield first, driver
        if first.poll() is None:
            first.kill()
        if driver.is_running():
            driver.kill()


def test_a_driver_that_stays_stopped_is_ended_and_told_as_stalled(
    node: tuple[subprocess.Popen[str], psutil.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, driver = node
    driver.suspend()
    struck = time.monotonic()
    assert first.wait(timeout=30) == ExitCode.FAILED
    assert time.monotonic() - struck >= TIMEOUT and not driver.is_running()
    report = AttemptReport.model_validate_json((tmp_path / "last-word").read_text())
    words = f"no progress of the driver for 2 s: process {driver.pid} is stopped by a signal (SIGSTOP)"
    assert (report.stalled, report.exit_code, report.stages) == (words, ExitCode.FAILED, []) and report.node


def test_a_driver_that_goes_on_in_time_lives_and_gets_its_signals(
    node: tuple[subprocess.Popen[str], psutil.Process],
) -> None:
    first, driver = node
    for _ in range(2):  # together longer than the timeout
        driver.suspend()
        time.sleep(TIMEOUT * 0.6)
        driver.resume()
        time.sleep(1.2)  # long enough to be detected
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == ExitCode.INTERRUPTED
