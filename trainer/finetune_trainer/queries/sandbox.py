"""Queries run in another process, which is killed where one does not end, and started again for the next."""

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
"""Bytes of address space that a query may take beyond the engine's own."""
GRACE_SECONDS = 2.0
"""How much longer than its time a query may take to notice that it is over."""
START_SECONDS = 120.0
MAKE_SECONDS = 600.0
SHOWN = 500
_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")


class DatabaseError(Exception):
    """A database that can't be made, opened or described; the message says why."""


class Sandbox:
    """A database and the process that its queries run in. A context manager, for one thread at a time.

    Args:
        seconds: a query that takes longer has failed.
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
        """The first `most` rows of a query.

        Raises:
            QueryFailed: it is wrong, does more than read, takes too long or too much, or kills the engine.
            DatabaseError: the database can't be opened.
        """
        asked = {"query": query, "seconds": self.seconds, "most": most}
        answer = self._ask(asked, self.seconds + GRACE_SECONDS)
        if "kind" in answer:
            raise QueryFailed(answer["kind"], " ".join(answer["error"].split())[:SHOWN])
        return QueryResult(tuple(answer["columns"]), tuple(map(tuple, answer["rows"])), answer["more"])

    def schema(self, samples: int = 3) -> str:
        """What there is to ask for, with a few example rows or values.

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
            raise QueryFailed("crash", "the engine's process died of it")
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
        """The process's next line; empty where it has ended.

        Raises:
            TimeoutError: there is none yet.
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
    """A database file made of statements, anew, in a process of its own.

    Raises:
        DatabaseError: the statements are wrong, or take longer than ten minutes.
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
    answer = json.loads(out.splitlines()[-1]) if out.strip() else {"error": "the engine's process died of it"}
    if "error" in answer:
        raise DatabaseError(" ".join(answer["error"].split())[:SHOWN])


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A child that has none of this process's variables: API keys are among them."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer.queries.child", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        start_new_session=True,
    )
