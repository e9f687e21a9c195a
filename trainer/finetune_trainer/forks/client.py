"""The fork server from the side of the process that starts it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune_trainer.forks import wire

BACKLOG = 256


@contextmanager
def fork_server(modules: list[str], for_workers: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has imported these modules, or is about to: whoever asks meanwhile waits.

    Every process that is started inside finds it by its environment. It ends with this process at the latest.

    Args:
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
    """It inherits the listening socket, and ends where its standard input does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        number = listener.fileno()
        command = [sys.executable, "-m", "finetune_trainer.forks.server", str(number), *names]
        return subprocess.Popen(command, pass_fds=[number], stdin=subprocess.PIPE)


def run_fork(argv: list[str], begun: Callable[[int], None] = lambda pid: None) -> int | None:
    """Run a script as a fork, pass SIGTERM and SIGINT on to it, and return its exit status.

    Returns None where there is no server: nothing has run then.

    Args:
        begun: called with the id of the new process.
    """
    connection = wire.connect()
    if connection is None:
        return None
    wire.ask(connection, argv, dict(os.environ))
    pid = wire.line(connection)
    if pid is None:
        return None
    _pass_signals_on(pid)
    begun(pid)
    status = wire.line(connection)
    return 128 + signal.SIGKILL if status is None else status


def run_child(argv: Sequence[str], begun: Callable[[int], None] = lambda pid: None) -> int:
    """Run a script as a child of this process, without a server, in the same way."""
    with subprocess.Popen([sys.executable, *argv]) as child:
        _pass_signals_on(child.pid)
        begun(child.pid)
        code = child.wait()
    return code if code >= 0 else 128 - code


def _pass_signals_on(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(pid, received))
