"""A server process with its output in a file: started until ready, stopped cleanly, and never left running."""

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
        """Start the server and wait until `ready()`.

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
        """Whether the process ends in the next `seconds`; its death cuts the wait short."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, grace: float = 20) -> None:
        """Send SIGTERM, and SIGKILL if it still runs after `grace` seconds; do nothing if it does not run."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        if not self._ended_within(grace):
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL, which simulates a crash."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def free_port() -> int:
    """Return a free TCP port of the loopback device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether a process listens on that port of the loopback device."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tied_to_this_process() -> list[str]:
    """Return a command prefix with which the kernel ends the server when the tests are killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
