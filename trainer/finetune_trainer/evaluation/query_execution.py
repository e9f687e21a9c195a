"""Compare the results of generated queries with those of the reference queries."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune_api.problems import Problem
from finetune_api.stages import Database
from finetune_trainer.errors import UserError
from finetune_trainer.model.source import local_path
from finetune_trainer.queries.result import QueryFailed
from finetune_trainer.queries.sandbox import DatabaseError, Sandbox, make_database

MOST_ROWS = 10_000
"""A query that returns more rows counts as failed."""
_FENCE = re.compile(r"```(?:\w+\n)?(.*?)(?:```|\Z)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^']|'')*'")
_PARENTHESES = re.compile(r"\([^()]*\)")
_ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)

Rows = list[tuple[Any, ...]]


def open_database(database: Database, where: str, base_dir: Path, cache_dir: Path) -> Sandbox:
    """Open the database, created once in the cache; a relative path is relative to the job's file.

    Args:
        where: the path of the field in the job, for errors.

    Raises:
        UserError: a file is missing, a statement fails, or a file is not a database.
    """
    field = next(name for name in ("file", "script", "sql") if getattr(database, name) is not None)
    try:
        path = _path(database, field, base_dir, cache_dir)
        sandbox = Sandbox(database.engine, path, database.timeout_seconds)
        sandbox.schema(0)
    except FileNotFoundError as error:
        raise UserError([Problem(f"{where}.{field}", f"no such file: {getattr(database, field)}")]) from error
    except DatabaseError as error:
        raise UserError([Problem(f"{where}.{field}", f"{database.engine} refuses it: {error}")]) from error
    return sandbox


def query_in(answer: str) -> str:
    """Return the query in an answer: its first fenced code block, or the complete answer."""
    fenced = _FENCE.search(answer)
    return (fenced.group(1) if fenced else answer).strip()


def execution(database: Sandbox, answer: str, reference: str) -> tuple[float, str]:
    """Return 1 if the query of the answer returns the same result as the reference, else 0; and its error, if any."""
    query = query_in(reference)
    try:
        expected = returned(database, query)
    except QueryFailed as error:
        return 0.0, f"the reference failed: {error}"
    try:
        return float(same(query, expected, returned(database, query_in(answer)))), ""
    except QueryFailed as error:
        return 0.0, str(error)


def returned(database: Sandbox, query: str) -> Rows:
    """Return all rows of a query.

    Raises:
        QueryFailed: the query is invalid, not read-only, exceeds the timeout or returns too many rows.
    """
    result = database.run(query, MOST_ROWS)
    if result.more:
        raise QueryFailed("invalid", f"returns more than {MOST_ROWS} rows")
    return list(result.rows)


def same(reference: str, expected: Rows, got: Rows) -> bool:
    """Return whether two results are equal: in order if the reference has a top-level `ORDER BY`, else in any order.

    Column names are ignored, but not their order. Floats are compared to six significant digits.
    """
    left, right = [_comparable(row) for row in expected], [_comparable(row) for row in got]
    if _is_ordered(reference):
        return left == right
    return Counter(left) == Counter(right)


def _path(database: Database, field: str, base_dir: Path, cache_dir: Path) -> Path:
    """Return the database's file. Raises FileNotFoundError or DatabaseError."""
    if database.sql is not None:
        return _made(database, database.sql, cache_dir)
    path = local_path(getattr(database, field), str(base_dir))
    if not path.is_file():
        raise FileNotFoundError(path)
    return path if field == "file" else _made(database, path.read_text(encoding="utf-8"), cache_dir)


def _made(database: Database, statements: str, cache_dir: Path) -> Path:
    """Create the database from the statements atomically and return it."""
    key = hashlib.sha256(f"{database.engine}\n{statements}".encode()).hexdigest()[:32]
    path = cache_dir / "databases" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}")
            make_database(database.engine, part, statements)
            os.replace(part, path)
    return path


def _is_ordered(query: str) -> bool:
    bare, before = _QUOTED.sub("", query), ""
    while bare != before:
        bare, before = _PARENTHESES.sub("", bare), bare
    return _ORDERED.search(bare) is not None


def _comparable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_value(value) for value in row)


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return repr(value) if isinstance(value, (list, dict)) else value
