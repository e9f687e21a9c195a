"""The `finetune` command with access to a cluster, as a user runs it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import Result
from support.cluster.finetune_jobs import Jobs
from typer.testing import CliRunner

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_cli.main import app

PROGRAM = "from finetune_cli.main import main; main()"


class Finetune:
    """The command with a kubeconfig in its environment."""

    def __init__(self, kubeconfig: Path) -> None:
        self.environment = {"KUBECONFIG": str(kubeconfig), "TERM": "dumb", "COLUMNS": "200"}

    def __call__(self, *arguments: object, stdin: str = "") -> Result:
        """Run the command to its end in this process, so that imports happen once for all tests."""
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env=self.environment)

    @contextmanager
    def started(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Start a process whose lines the test reads; kill it at the end if it still runs."""
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        environment, pipe = os.environ | self.environment, subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def on_a_terminal(self, *arguments: object) -> Iterator[Terminal]:
        """Start a process on a separate terminal of 120 columns by 40 lines."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        environment = os.environ | self.environment | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            try:
                yield Terminal(process, ours)
            finally:
                process.kill()
                os.close(ours)


def write_status(jobs: Jobs, status: dict[str, Any], name: str = "tiny") -> None:
    """Replace the status through the status subresource, as the operator does."""
    body = jobs.read(name) | {"status": status}
    jobs.api.replace_namespaced_custom_object_status(GROUP, VERSION, jobs.namespace, PLURAL, name, body)


class Terminal:
    """The terminal output of a process."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self._process, self._descriptor = process, descriptor
        self._rest = b""

    def until(self, words: str, seconds: float = 30) -> str:
        """Return the output up to `words`, including control sequences.

        Raises:
            AssertionError: the process ends, or writes nothing for `seconds`, before that.
        """
        while words.encode() not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], seconds)
            try:
                piece = os.read(self._descriptor, 65536) if ready else b""
            except OSError:  # Linux reports the closed side of the process in this way
                piece = b""
            assert piece, f"no {words!r} in {self._rest.decode(errors='replace')}"
            self._rest += piece
        before, self._rest = self._rest.split(words.encode(), 1)
        return before.decode() + words

    def exit_code(self) -> int:
        return self._process.wait(30)
