"""SQL that a model wrote, run on a database that it can only read, in limited time and memory."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import duckdb

from finetune_api.problems import Problem
from finetune_api.stages import Database
from finetune_trainer.errors import UserError
from finetune_trainer.model.source import local_path

MOST_ROWS = 100_000
"""A query that returns more counts as failed."""
MOST_BYTES = 16 << 20
"""Largest text or blob that SQLite makes."""
_FENCE = re.compile(r"```(?:\w+\n)?(.*?)(?:```|\Z)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^']|'')*'")
_PARENTHESES = re.compile(r"\([^()]*\)")
_ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)
_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_CHECK_EVERY = 10_000  # SQLite's instructions between two looks at the clock

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Returned:
    """What a query gave: its rows, or why it failed."""

    rows: Rows | None
    error: str = ""


class Engine(Protocol):
    """A database open for reading."""

    def run(self, sql: str) -> Returned:
        """Run one query."""


def open_database(database: Database, where: str, base_dir: str) -> Engine:
    """The database, made from its script where it is none yet. A relative path starts at the job's file.

    Args:
        where: the database's path in the job, for errors.

    Raises:
        UserError: a file is not there, or the script does not run.
    """
    field = next(name for name in ("file", "script", "sql") if getattr(database, name) is not None)
    value = getattr(database, field)
    path = None if field == "sql" else local_path(value, base_dir)
    if path is not None and not path.is_file():
        raise UserError([Problem(f"{where}.{field}", f"no such file: {value}")])
    script = None if field == "file" else value if path is None else path.read_text(encoding="utf-8")
    make = _Sqlite if database.engine == "sqlite" else _Duckdb
    try:
        return make(path if field == "file" else None, script, database.timeout_seconds)
    except (sqlite3.Error, duckdb.Error) as error:
        raise UserError([Problem(f"{where}.{field}", f"{database.engine} refuses it: {_first_line(error)}")]) from error


def query_in(answer: str) -> str:
    """The query in a model's answer: what is in its first fenced block, or all of it."""
    fenced = _FENCE.search(answer)
    return (fenced.group(1) if fenced else answer).strip()


def same(reference: str, expected: Rows, got: Rows) -> bool:
    """Whether two results are the same: in order where the reference has an `ORDER BY` of its own (not in a subquery),
    else in any order.

    Names of columns don't matter, their order does; floats are compared to six significant digits.
    """
    left, right = [_comparable(row) for row in expected], [_comparable(row) for row in got]
    if _is_ordered(reference):
        return left == right
    return Counter(left) == Counter(right)


class _Sqlite:
    """SQLite: a file opened read-only, or a script's tables in memory; nothing but reading is allowed."""

    def __init__(self, file: Path | None, script: str | None, timeout: int) -> None:
        self.timeout = timeout
        if file is not None:
            uri = f"file:{quote(str(file.absolute()))}?mode=ro"
            self.connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            self.connection.execute("SELECT name FROM sqlite_master LIMIT 1")  # a file of another kind fails here
        else:
            self.connection = sqlite3.connect(":memory:", check_same_thread=False)
            self.connection.executescript(script or "")
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        self.connection.set_authorizer(_allow_reading)

    def run(self, sql: str) -> Returned:
        if not sql:
            return Returned(None, "there is no query")
        end = time.monotonic() + self.timeout
        self.connection.set_progress_handler(lambda: time.monotonic() > end, _CHECK_EVERY)
        try:
            return _limited(self.connection.execute(sql).fetchmany(MOST_ROWS + 1))
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            late = time.monotonic() > end
            return Returned(None, f"took more than {self.timeout} s" if late else _first_line(error))


class _Duckdb:
    """DuckDB: one `SELECT` at a time, no files, no network."""

    def __init__(self, file: Path | None, script: str | None, timeout: int) -> None:
        self.timeout = timeout
        self.connection = duckdb.connect(str(file) if file else ":memory:", read_only=file is not None)
        if script:
            self.connection.execute(script)
        for setting in ("enable_external_access = false", "memory_limit = '1GB'", "lock_configuration = true"):
            self.connection.execute(f"SET {setting}")

    def run(self, sql: str) -> Returned:
        try:
            statements = self.connection.extract_statements(sql)
            kinds = [statement.type for statement in statements]
            if kinds != [duckdb.StatementType.SELECT]:
                return Returned(None, "expected one SELECT")
            with self._deadline():
                return _limited(self.connection.execute(statements[0]).fetchmany(MOST_ROWS + 1))
        except duckdb.InterruptException:
            return Returned(None, f"took more than {self.timeout} s")
        except (duckdb.Error, ValueError, RuntimeError, MemoryError) as error:
            return Returned(None, _first_line(error))

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        timer = threading.Timer(self.timeout, self.connection.interrupt)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _limited(rows: Rows) -> Returned:
    return Returned(rows) if len(rows) <= MOST_ROWS else Returned(None, f"returns more than {MOST_ROWS} rows")


def _allow_reading(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def _is_ordered(sql: str) -> bool:
    bare, before = _QUOTED.sub("", sql), ""
    while bare != before:
        bare, before = _PARENTHESES.sub("", bare), bare
    return _ORDERED.search(bare) is not None


def _comparable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_value(value) for value in row)


def _value(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, float):
        return repr(value) if isinstance(value, (list, dict)) else value
    return float(f"{value:.6g}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
