"""One server process: started with its output in a file, ready or dead, stopped cleanly and never left behind."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.05
LOG_LINES = 30


class ServerFailed(Exception):
    """A server ended, or did not become ready in time; the message has the end of its log."""


class Server:
    """A server process that can be started again with the same command."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = [*_tied_to_this_process(), *command]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, ready: Callable[[], bool], timeout: float = 60) -> None:
        """Start it and come back once `ready()`.

        Raises:
            ServerFailed: it ended before that, or took longer than `timeout` seconds.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + timeout
        while not ready():
            if self._ended_within(POLL_SECONDS) or time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} is not ready (exit code {self._process.poll()}):\n{self.log_tail()}")

    def _ended_within(self, seconds: float) -> bool:
        """Whether the process ends in the next `seconds`: the pause between two looks, cut short by its death."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, grace: float = 20) -> None:
        """SIGTERM, and SIGKILL where that is not heard within `grace` seconds; nothing where it is not running."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        if not self._ended_within(grace):
            self.kill()

    def kill(self) -> None:
        """SIGKILL: what a crash looks like from outside."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def free_port() -> int:
    """A TCP port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether something listens on that port of the loopback device."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tied_to_this_process() -> list[str]:
    """A prefix that has the kernel end the server when the tests are killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
