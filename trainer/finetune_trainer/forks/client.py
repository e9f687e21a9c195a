"""Starts the fork server and requests forks from it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.forks import wire

BACKLOG = 256


@contextmanager
def fork_server(modules: list[str], for_workers: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that imports modules; requests wait until it has imported them. A context manager.

    Processes that are started inside find the server by their environment. It ends with this process at the latest.

    Args:
        modules: modules that do not import Ray.
        for_workers: modules that need Ray.
    """
    directory, before = Path(tempfile.mkdtemp(prefix="forks-")), os.environ.get(wire.SOCKET_VARIABLE)
    os.environ[wire.SOCKET_VARIABLE] = str(directory / "socket")
    server = _start(directory / "socket", [*modules, "--", *for_workers])
    try:
        yield server
    finally:
        server.terminate()  # it may still be importing
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)
        if before is None:
            del os.environ[wire.SOCKET_VARIABLE]
        else:
            os.environ[wire.SOCKET_VARIABLE] = before


def _start(path: Path, names: list[str]) -> subprocess.Popen[bytes]:
    """Start the server process, which inherits the listening socket and ends when its standard input is closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        number = listener.fileno()
        command = [sys.executable, "-m", "finetune_trainer.forks.server", str(number), *names]
        return subprocess.Popen(command, pass_fds=[number], stdin=subprocess.PIPE)


def run_fork(argv: list[str]) -> int | None:
    """Run a script as a fork, forward SIGTERM and SIGINT to it, and return its exit status.

    Returns None if there is no server; the script has not run then.
    """
    connection = wire.connect()
    if connection is None:
        return None
    wire.send_request(connection, argv, dict(os.environ))
    pid = wire.read_number(connection)
    if pid is None:
        return None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    status = wire.read_number(connection)
    return 128 + signal.SIGKILL if status is None else status
