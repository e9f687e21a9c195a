"""Run queries in another process, which is killed if a query does not end and restarted for the next one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune_trainer.queries.result import Engine, QueryFailed, QueryResult

MEMORY = 1 << 30
"""Address space in bytes for a query, in addition to the engine's."""
GRACE_SECONDS = 2.0
"""Time after a query's timeout for the engine to stop it itself."""
START_SECONDS = 120.0
MAKE_SECONDS = 600.0
SHOWN = 500
_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")


class DatabaseError(Exception):
    """A database that can't be made, opened or described; the message says why."""


class Sandbox:
    """A database and the process that its queries run in. A context manager, for one thread at a time.

    Args:
        seconds: the timeout of a query.
    """

    def __init__(self, engine: Engine, path: Path, seconds: float = 10.0, memory: int = MEMORY) -> None:
        self.engine, self.path, self.seconds, self.memory = engine, path, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, query: str, most: int = 1000) -> QueryResult:
        """Return the first `most` rows of a query.

        Raises:
            QueryFailed: it is invalid, not read-only, takes too much time or memory, or crashes the engine.
            DatabaseError: the database can't be opened.
        """
        request = {"query": query, "seconds": self.seconds, "most": most}
        answer = self._ask(request, self.seconds + GRACE_SECONDS)
        if "kind" in answer:
            raise QueryFailed(answer["kind"], " ".join(answer["error"].split())[:SHOWN])
        return QueryResult(tuple(answer["columns"]), tuple(map(tuple, answer["rows"])), answer["more"])

    def schema(self, samples: int = 3) -> str:
        """Return a description of the schema with a few example rows or values.

        Raises:
            DatabaseError: the database can't be opened or described.
        """
        try:
            return str(self._ask({"schema": samples}, START_SECONDS)["schema"])
        except (QueryFailed, KeyError) as error:
            raise DatabaseError(f"{self.path.name} can't be described: {error}") from error

    def close(self) -> None:
        """End the process."""
        process, self._process, self._pending = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.communicate()

    def _ask(self, value: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            raise QueryFailed("timeout", f"takes more than {self.seconds:g} s") from None
        if not line:
            self.close()
            raise QueryFailed("crash", "the query crashed the engine's process")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = _spawn(["run", self.engine, str(self.path), str(self.memory)])
        self._process = process
        try:
            answer = json.loads(self._line(process, START_SECONDS) or b'{"error": "the engine does not start"}')
        except TimeoutError:
            answer = {"error": f"the engine does not start within {START_SECONDS:.0f} s"}
        if "error" in answer:
            self.close()
            raise DatabaseError(f"{self.path.name} can't be opened: {answer['error'][:SHOWN]}")
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Return the next line of the process; empty if it has ended.

        Raises:
            TimeoutError: no line came in time.
        """
        assert process.stdout is not None
        file, deadline = process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._pending:
            if not select.select([file], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            piece = os.read(file, 1 << 16)
            if not piece:
                return b""
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def make_database(engine: Engine, path: Path, statements: str) -> None:
    """Create a database file from statements in a separate process; an existing file is replaced.

    Raises:
        DatabaseError: the statements are invalid, or take longer than ten minutes.
    """
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    process = _spawn(["make", engine, str(path)])
    try:
        out, _ = process.communicate(statements.encode(), timeout=MAKE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise DatabaseError(f"the statements take longer than {MAKE_SECONDS / 60:.0f} minutes") from None
    answer = (
        json.loads(out.splitlines()[-1]) if out.strip() else {"error": "the statements crashed the engine's process"}
    )
    if "error" in answer:
        raise DatabaseError(" ".join(answer["error"].split())[:SHOWN])


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start the child without this process's environment variables, which include API keys."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer.queries.child", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        start_new_session=True,
    )
