"""A terminated pod without the driver waits until the driver in another pod has ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.cluster.servers import free_port

from finetune_api.cluster import Resources
from finetune_api.exit_codes import ExitCode
from finetune_api.report import AttemptReport
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch import node
from finetune_trainer.launch.drive import TOKEN_FILE_VARIABLE
from finetune_trainer.launch.node_role import NodeRole
from finetune_trainer.progress.report_server import ReportServer

HERE, HEAD = "127.0.0.1", "head.test"
SAVING_SECONDS = 1.5


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the port of this test's driver."""
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(tmp_path / "token"))
    found = free_port()
    monkeypatch.setattr(node, "PORT", found)
    return found


@pytest.fixture
def ray() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that replaces `ray start --block`."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_driver_that_is_asked_to_stop_is_waited_for(port: int, ray: subprocess.Popen[bytes]) -> None:
    asked, ended = threading.Event(), []

    def drive() -> None:
        with ReportServer(lambda: AttemptReport(stages=[]), asked.set, "secret", (HERE, port)):
            up.set()
            assert asked.wait(30)
            time.sleep(SAVING_SECONDS)  # saves the last checkpoint
            ended.append(ray.poll())

    up, driver = threading.Event(), threading.Thread(target=drive)
    driver.start()
    assert up.wait(30)
    node._leave(HERE, ray)
    began = time.monotonic()
    assert ray.wait(30) == -9
    driver.join(30)
    assert ended == [None], "the pod left while the driver was saving"
    assert time.monotonic() - began >= SAVING_SECONDS


def test_a_head_that_loses_its_name_is_still_asked_and_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KubeRay deletes the head's Service with the pods (Kueue's preemption does), while the driver still saves."""
    asked, lost, ready, saved = (threading.Event() for _ in range(4))
    known, register = socket.getaddrinfo, signal.signal
    earlier = signal.getsignal(signal.SIGTERM)

    def look_up(host: str, *rest: Any, **options: Any) -> Any:
        if host == HEAD and lost.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(HERE if host == HEAD else host, *rest, **options)

    def preempt() -> None:
        with ReportServer(lambda: AttemptReport(stages=[]), asked.set, "secret", (HERE, port)):
            assert ready.wait(30)
            lost.set()
            os.kill(os.getpid(), signal.SIGTERM)
            if asked.wait(10):
                time.sleep(SAVING_SECONDS)
                saved.set()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: look_up(host, port)[0][4][0])
    monkeypatch.setattr(signal, "signal", lambda *given: (register(*given), ready.set()))
    monkeypatch.setattr(node, "_RAY", ["sh", "-c", "exec sleep 600"])
    run = SimpleNamespace(job=SimpleNamespace(spec=SimpleNamespace(resources=Resources())))
    driver = threading.Thread(target=preempt)
    driver.start()
    try:
        assert node._worker(cast(RunConfig, run), NodeRole(False, f"{HEAD}:{port}", ())) == ExitCode.FAILED
        assert saved.is_set(), "the pod left while the driver was saving"
    finally:
        register(signal.SIGTERM, earlier)
        driver.join(30)


def test_without_a_driver_a_pod_leaves_at_once(port: int, ray: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    node._leave(HERE, ray)
    assert ray.wait(30) == -9 and time.monotonic() - began < node.LOST_SECONDS


def test_a_driver_that_is_not_reached_is_looked_for_no_longer_than_that(
    port: int, ray: subprocess.Popen[bytes]
) -> None:
    node._leave("192.0.2.1", ray)
    assert ray.wait(30 + node.LOST_SECONDS) == -9
