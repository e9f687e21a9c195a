"""A node whose `ray start` fails although the head runs starts it again."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.launch import node
from finetune_trainer.launch.node_role import NodeRole

RAY = """
import os, signal, sys
with open(sys.argv[1], "a") as file:
    file.write("started\\n")
if len(open(sys.argv[1]).readlines()) == int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1)
"""
"""A `ray start` that fails until the given start, which ends as if `_leave` had killed it."""


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """Return a port that accepts connections."""
    handler = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
    signal.signal(signal.SIGTERM, handler)


def _starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int, last: int) -> int:
    """Return how often a node starts Ray."""
    log = tmp_path / "starts"
    monkeypatch.setattr(node, "_RAY", [sys.executable, "-c", RAY, str(log), str(last)])
    node._stay_joined(NodeRole(False, f"127.0.0.1:{port}", ()), "127.0.0.1", port)
    return len(log.read_text().splitlines())


def test_a_node_that_cannot_join_at_first_starts_ray_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _starts(tmp_path, monkeypatch, head.getsockname()[1], last=3) == 3
    assert capfd.readouterr().err.count("could not join") == 2


def test_a_node_that_can_never_join_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: socket.socket) -> None:
    assert _starts(tmp_path, monkeypatch, head.getsockname()[1], last=99) == node.JOIN_ATTEMPTS


def test_a_node_whose_head_has_ended_does_not_start_ray_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: socket.socket
) -> None:
    port = head.getsockname()[1]
    head.close()
    assert _starts(tmp_path, monkeypatch, port, last=99) == 1


def test_a_node_that_ray_has_left_long_after_it_joined_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: socket.socket
) -> None:
    monkeypatch.setattr(node, "JOIN_SECONDS", 0.0)
    assert _starts(tmp_path, monkeypatch, head.getsockname()[1], last=99) == 1
