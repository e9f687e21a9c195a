"""Create, open, describe and query the embedded databases, in the process that runs the queries."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol
from urllib.parse import quote

from finetune_trainer.queries.guard import check_cypher, check_sql
from finetune_trainer.queries.result import Engine, FailureKind, QueryFailed, QueryResult

MEMORY = 512 << 20
"""Memory limit of a query in bytes, for engines that can enforce one."""
MAX_VALUE = 16 << 20
_SQLITE_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_SQLITE_REFUSED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}


class Database(Protocol):
    """A database opened read-only."""

    def run(self, query: str, seconds: float, most: int) -> QueryResult:
        """Return the first `most` rows of a query.

        Raises:
            QueryFailed: the query is invalid, not read-only, or takes too long.
        """

    def schema(self, samples: int) -> str:
        """Return a description of the schema, with `samples` example rows or values."""


def open_database(engine: Engine, path: str) -> Database:
    """Open a database read-only; errors of the engine propagate."""
    databases: dict[Engine, Callable[[str], Database]] = {"sqlite": Sqlite, "duckdb": Duck, "cypher": Graph}
    return databases[engine](path)


def make_database(engine: Engine, path: str, statements: str) -> None:
    """Create a database from statements; errors of the engine propagate."""
    {"sqlite": _make_sqlite, "duckdb": _make_duck, "cypher": _make_graph}[engine](path, statements)


class Sqlite:
    """SQLite, from the standard library."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None)
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        self._connection.execute(f"PRAGMA hard_heap_limit={MEMORY}")
        self._connection.execute("PRAGMA temp_store=MEMORY")
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)

    def run(self, query: str, seconds: float, most: int) -> QueryResult:
        """See `Database`."""
        check_sql(query)
        deadline = time.monotonic() + seconds
        self._connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        self._connection.set_authorizer(_sqlite_authorizer)
        try:
            cursor = self._connection.execute(query)
            names = tuple(column[0] for column in cursor.description or ())
            return _result(names, cursor, most)
        except MemoryError as error:
            raise QueryFailed("memory", "takes too much memory") from error
        except sqlite3.Error as error:
            raise QueryFailed(_sqlite_kind(error), str(error)) from error
        finally:
            self._connection.set_authorizer(None)
            self._connection.set_progress_handler(None, 0)

    def schema(self, samples: int) -> str:
        """See `Database`."""
        tables = (
            "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY 1, 2"
        )
        parts = []
        for kind, name, sql in self._connection.execute(tables).fetchall():
            if kind in ("table", "view"):
                rows = self._connection.execute(f"SELECT * FROM {_quoted(name)} LIMIT {samples}")
                parts.append(_table(sql, [column[0] for column in rows.description], rows.fetchall()))
        return "\n\n".join(parts)


def _sqlite_authorizer(action: int, first: str | None, second: str | None, *_: Any) -> int:
    refused = action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _SQLITE_REFUSED
    return sqlite3.SQLITE_OK if action in _SQLITE_READS and not refused else sqlite3.SQLITE_DENY


def _sqlite_kind(error: sqlite3.Error) -> FailureKind:
    kinds: dict[int | None, FailureKind] = {
        sqlite3.SQLITE_INTERRUPT: "timeout",
        sqlite3.SQLITE_NOMEM: "memory",
        sqlite3.SQLITE_AUTH: "not read-only",
        sqlite3.SQLITE_READONLY: "not read-only",
    }
    return kinds.get(getattr(error, "sqlite_errorcode", None), "invalid")


def _make_sqlite(path: str, statements: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(statements)
    connection.commit()
    connection.close()


class Duck:
    """DuckDB, without files, network or extensions."""

    def __init__(self, path: str) -> None:
        import duckdb

        settings: dict[str, str | bool | int | float | list[str]] = {
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "threads": "1",
            "memory_limit": f"{MEMORY >> 20}MB",
            "temp_directory": "",
        }
        self._duckdb: Any = duckdb
        self._connection: Any = duckdb.connect(path, read_only=True, config=settings)
        self._connection.execute("SET lock_configuration = true")

    def run(self, query: str, seconds: float, most: int) -> QueryResult:
        """See `Database`."""
        check_sql(query)
        timer = threading.Timer(seconds, self._connection.interrupt)
        timer.start()
        try:
            statements = self._connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != self._duckdb.StatementType.SELECT:
                raise QueryFailed("not read-only", "is not a single SELECT statement")
            self._connection.execute(statements[0])
            names = tuple(column[0] for column in self._connection.description or ())
            return _result(names, iter(self._connection.fetchone, None), most)
        except self._duckdb.InterruptException as error:
            raise QueryFailed("timeout", f"takes more than {seconds:g} s") from error
        except (self._duckdb.OutOfMemoryException, MemoryError) as error:
            raise QueryFailed("memory", "takes too much memory") from error
        except self._duckdb.PermissionException as error:
            raise QueryFailed("not read-only", str(error)) from error
        except self._duckdb.Error as error:
            raise QueryFailed("invalid", str(error)) from error
        finally:
            timer.cancel()

    def schema(self, samples: int) -> str:
        """See `Database`."""
        tables = (
            "SELECT table_name, sql FROM duckdb_tables() WHERE NOT internal "
            "UNION ALL SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY 1"
        )
        parts = []
        for name, sql in self._connection.execute(tables).fetchall():
            rows = self._connection.execute(f"SELECT * FROM {_quoted(name)} LIMIT {samples}")
            parts.append(_table(sql, [column[0] for column in rows.description], rows.fetchall()))
        return "\n\n".join(parts)


def _make_duck(path: str, statements: str) -> None:
    import duckdb

    connection = duckdb.connect(path)
    connection.execute(statements)
    connection.close()


class Graph:
    """LadybugDB, the successor of Kuzu: Cypher on typed node and relationship tables."""

    BUFFER = 256 << 20
    LARGEST = 1 << 34
    """Address space in bytes that the engine reserves for a database's file; a power of two."""

    def __init__(self, path: str, read_only: bool = True) -> None:
        import ladybug

        self._database: Any = ladybug.Database(
            path, buffer_pool_size=self.BUFFER, max_db_size=self.LARGEST, read_only=read_only
        )
        self._connection: Any = ladybug.Connection(self._database, num_threads=1)

    def run(self, query: str, seconds: float, most: int) -> QueryResult:
        """See `Database`."""
        check_cypher(query)
        self._connection.set_query_timeout(max(1, round(seconds * 1000)))
        try:
            result = self._connection.execute(query)
            try:
                return _result(tuple(result.get_column_names()), _graph_rows(result), most)
            finally:
                result.close()
        except MemoryError as error:
            raise QueryFailed("memory", "takes too much memory") from error
        except (RuntimeError, ValueError, OverflowError) as error:
            raise QueryFailed(_graph_kind(str(error)), str(error)) from error

    def schema(self, samples: int) -> str:
        """See `Database`."""
        tables = self._rows("CALL show_tables() RETURN name, type ORDER BY name")
        nodes = [name for name, kind in tables if kind == "NODE"]
        links = [name for name, kind in tables if kind == "REL"]
        lines = ["Node properties:"]
        for name in nodes:
            lines += self._properties(name, f"MATCH (n:{_backquoted(name)})", samples)
        lines.append("Relationship properties:")
        for name in links:
            lines += self._properties(name, f"MATCH ()-[n:{_backquoted(name)}]->()", samples)
        lines.append("The relationships:")
        for name in links:
            ends = self._rows(f"CALL show_connection('{name}') RETURN *")
            lines += [f"(:{end[0]})-[:{name}]->(:{end[1]})" for end in ends]
        return "\n".join(lines)

    def _properties(self, table: str, match: str, samples: int) -> list[str]:
        lines = [f"- **{table}**"]
        for name, kind in self._rows(f"CALL table_info('{table}') RETURN name, type"):
            if name.startswith("_"):
                continue  # a key that only the engine needs
            seen = self._rows(
                f"{match} WHERE n.{_backquoted(name)} IS NOT NULL RETURN DISTINCT n.{_backquoted(name)} LIMIT {samples}"
            )
            examples = ", ".join(repr(str(row[0])[:50]) for row in seen)
            lines.append(f"  - `{name}`: {kind}" + (f" Examples: {examples}" if examples else ""))
        return lines

    def _rows(self, query: str) -> list[list[Any]]:
        result = self._connection.execute(query)
        rows = list(_graph_rows(result))
        result.close()
        return rows

    def statement(self, text: str) -> None:
        """Run the statements of a script."""
        result = self._connection.execute(text)
        for one in result if isinstance(result, list) else [result]:
            one.close()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()
        self._database.close()


def _graph_rows(result: Any) -> Iterator[list[Any]]:
    while result.has_next():
        yield result.get_next()


def _graph_kind(message: str) -> FailureKind:
    lower = message.lower()
    if "interrupted" in lower:
        return "timeout"
    if "buffer manager exception" in lower or "bad_alloc" in lower or "memory" in lower:
        return "memory"
    return "not read-only" if "read-only" in lower or "write operations" in lower else "invalid"


def _make_graph(path: str, statements: str) -> None:
    graph = Graph(path, read_only=False)
    graph.statement(statements)
    graph.close()


def _result(names: tuple[str, ...], rows: Iterable[Any], most: int) -> QueryResult:
    found = [tuple(row) for row in islice(rows, most + 1)]
    return QueryResult(names, tuple(found[:most]), len(found) > most)


def _table(sql: str, names: list[str], rows: list[Any]) -> str:
    if not rows:
        return sql.strip()
    lines = [" | ".join(names), *(" | ".join(str(value)[:50] for value in row) for row in rows)]
    return "\n".join([sql.strip(), "/* example rows:", *(line.replace("*/", "* /") for line in lines), "*/"])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _backquoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def installed(engine: Engine) -> bool:
    """Return whether the engine's package is installed."""
    from importlib.util import find_spec

    package = {"sqlite": "sqlite3", "duckdb": "duckdb", "cypher": "ladybug"}[engine]
    return find_spec(package) is not None
