"""The `finetune` command against a cluster, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from finetune_cli.main import app

PROGRAM = "from finetune_cli.main import main; main()"


class Finetune:
    """The command with a kubeconfig in its environment."""

    def __init__(self, kubeconfig: Path) -> None:
        self.environment = {"KUBECONFIG": str(kubeconfig), "TERM": "dumb", "COLUMNS": "200"}

    def __call__(self, *arguments: object, stdin: str = "") -> Result:
        """Run it to its end, in this process: it imports what it needs once for all tests."""
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env=self.environment)

    @contextmanager
    def started(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """A process beside the test, which reads its lines; killed at the end where it still runs."""
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        environment, pipe = os.environ | self.environment, subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            try:
                yield process
            finally:
                process.kill()
