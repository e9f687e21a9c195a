"""Model-written queries run read-only, and are compared by the rows that they return."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.stages import Database
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.query_execution import execution, open_database, query_in, returned, same
from finetune_trainer.queries.sandbox import Sandbox

SCRIPT = """
CREATE TABLE t (a INTEGER, b TEXT, c DOUBLE);
INSERT INTO t VALUES (1, 'x', 0.5), (2, 'y', 1.5), (2, 'y', 1.5);
"""
ENGINES = ("sqlite", "duckdb")


def opened(engine: str, cache: Path, **fields: Any) -> Sandbox:
    given = {"sql": SCRIPT} | fields
    spec = Database.model_validate({"engine": engine, **{name: value for name, value in given.items() if value}})
    return open_database(spec, "stages[0].evaluate.database", Path("."), cache)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with opened(request.param, tmp_path_factory.mktemp("cache")) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("SELECT b, a FROM t", "SELECT b, a FROM t", True),
        ("```sql\nSELECT a FROM t ORDER BY a DESC;\n```\nThis sorts.", "SELECT a FROM t", True),
        ("SELECT a AS other FROM t", "SELECT a FROM t", True),
        ("SELECT DISTINCT a FROM t", "SELECT a FROM t", False),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", False),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a", False),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM (SELECT a FROM t ORDER BY a) AS s", True),
        ("SELECT a FROM t GROUP BY a ORDER BY a", "SELECT a FROM t GROUP BY a ORDER BY count(*) DESC", False),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT 1.0", "SELECT 1", True),
        ("WITH s AS (SELECT max(a) AS m FROM t) SELECT m FROM s", "SELECT 2", True),
    ],
)
def test_queries_are_right_where_they_return_the_same(
    engine: Sandbox, answer: str, reference: str, right: bool
) -> None:
    assert execution(engine, answer, reference) == (float(right), "")


@pytest.mark.parametrize(
    "attack",
    [
        "DELETE FROM t",
        "INSERT INTO t VALUES (9, 'z', 1)",
        "DROP TABLE t",
        "ATTACH 'other.db' AS o",
        "SELECT 1; DELETE FROM t",
        "PRAGMA writable_schema = 1",
        "COPY t TO 'stolen.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM nothing",
        "I don't know",
        "",
    ],
)
def test_whatever_else_a_model_writes_fails_and_changes_nothing(engine: Sandbox, attack: str) -> None:
    correct, error = execution(engine, attack, "SELECT count(*) FROM t")
    assert correct == 0 and error
    assert returned(engine, "SELECT count(*) FROM t") == [(3,)]


def test_a_query_without_end_is_ended(tmp_path: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with opened("sqlite", tmp_path, timeoutSeconds=3) as engine:
        returned(engine, "SELECT 1")
        started = time.monotonic()
        correct, error = execution(engine, endless, "SELECT 1")
        assert correct == 0 and error
        assert time.monotonic() - started < 60
        assert execution(engine, "SELECT 1", "SELECT 1") == (1, "")


def test_too_many_rows_are_a_failure(engine: Sandbox) -> None:
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10001) SELECT i FROM n"
    assert execution(engine, many, "SELECT 1") == (0, "returns more than 10000 rows")


def test_a_file_is_opened_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "a b.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCRIPT)
    with opened("sqlite", tmp_path, sql=None, file=str(path)) as engine:
        assert execution(engine, "DELETE FROM t", "SELECT 1")[0] == 0
        assert returned(engine, "SELECT max(a) FROM t") == [(2,)]


def test_cypher_too(tmp_path: Path) -> None:
    graph = "CREATE NODE TABLE M(title STRING PRIMARY KEY, year INT64); CREATE (:M {title: 'A', year: 1999});"
    with opened("cypher", tmp_path, sql=graph) as engine:
        assert execution(engine, "MATCH (x:M) RETURN x.year", "MATCH (m:M {title: 'A'}) RETURN m.year") == (1, "")
        assert execution(engine, "MATCH (m:M) RETURN m.title", "MATCH (m:M) RETURN m.year") == (0, "")
        assert execution(engine, "MATCH (m:M) DELETE m", "MATCH (m:M) RETURN m.year")[0] == 0


@pytest.mark.parametrize("name", ENGINES)
def test_a_database_that_cannot_be_made_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"database\.sql: {name} refuses it: .*syntax error"):
        opened(name, tmp_path, sql="CREATE TABEL t (a)")
    with pytest.raises(UserError, match=r"no such file: gone\.db"):
        opened(name, tmp_path, sql=None, file="gone.db")
    (tmp_path / "text.db").write_text("no database, but longer than a header is: " * 20)
    with pytest.raises(UserError, match=f"{name} refuses it"):
        opened(name, tmp_path, sql=None, file=str(tmp_path / "text.db"))


def test_the_query_is_what_is_fenced() -> None:
    assert query_in("Here:\n```sql\nSELECT 1\n```\nand\n```\nSELECT 2\n```") == "SELECT 1"
    assert query_in("```SELECT 1") == "SELECT 1"
    assert query_in(" SELECT 1; ") == "SELECT 1;"


def test_order_in_a_text_is_no_order() -> None:
    assert same("SELECT 'order by (' FROM t", [(1,), (2,)], [(2,), (1,)])
