"""Queries of all kinds on the real engines: read-only ones run, others are rejected, and nothing hangs or crashes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_trainer.queries.result import Engine, QueryFailed
from finetune_trainer.queries.sandbox import DatabaseError, Sandbox, make_database

TABLES = "CREATE TABLE m(title TEXT PRIMARY KEY, released INT); INSERT INTO m VALUES ('A', 1999), ('B', 2001);"
GRAPH = """
CREATE NODE TABLE Movie(title STRING PRIMARY KEY, released INT64);
CREATE NODE TABLE Person(name STRING PRIMARY KEY);
CREATE REL TABLE ACTED_IN(FROM Person TO Movie, role STRING);
CREATE (:Movie {title: 'A', released: 1999}), (:Movie {title: 'B', released: 2001});
CREATE (:Person {name: 'X'});
MATCH (p:Person), (m:Movie) CREATE (p)-[:ACTED_IN {role: 'hero'}]->(m);
"""
SCRIPTS: dict[Engine, str] = {"sqlite": TABLES, "duckdb": TABLES, "cypher": GRAPH}
WHOLE: dict[Engine, str] = {
    "sqlite": "SELECT count(*) FROM m",
    "duckdb": "SELECT count(*) FROM m",
    "cypher": "MATCH (m:Movie) RETURN count(m)",
}
SECONDS = 1.0
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


Open = Callable[[Engine], Sandbox]
ENGINES: list[Engine] = ["sqlite", "duckdb", "cypher"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Return a function that opens the sandbox of an engine's small database, shared by all tests."""
    made: dict[Engine, Sandbox] = {}

    def open_one(engine: Engine) -> Sandbox:
        if engine not in made:
            path = tmp_path_factory.mktemp(engine) / "db"
            make_database(engine, path, SCRIPTS[engine])
            made[engine] = Sandbox(engine, path, SECONDS)
        return made[engine]

    yield open_one
    for sandbox in made.values():
        sandbox.close()


CASES: list[tuple[Engine, str, str]] = [
    ("sqlite", "SELECT title FROM m WHERE released > 2000", "B"),
    ("sqlite", "select title from m limit 1; -- the first", "A"),
    ("sqlite", "SELECT title FROM m WHERE title <> 'DELETE; x' LIMIT 1", "A"),
    ("sqlite", "SELECT title FROM m WHERE title <> '\\' LIMIT 1", "A"),
    ("sqlite", "SELECT nope FROM m", "invalid"),
    ("sqlite", "", "invalid"),
    ("sqlite", "SELECT 1; SELECT 2", "invalid"),
    ("sqlite", "DELETE FROM m", "not read-only"),
    ("sqlite", "WITH d AS (SELECT 1) DELETE FROM m", "not read-only"),
    ("sqlite", "ATTACH 'x' AS y", "not read-only"),
    ("sqlite", "PRAGMA table_info(m)", "not read-only"),
    ("sqlite", "SELECT load_extension('x')", "invalid"),
    ("sqlite", ENDLESS, "timeout"),
    ("duckdb", "SELECT title FROM m WHERE released > 2000", "B"),
    ("duckdb", "FROM m SELECT title LIMIT 1", "A"),
    ("duckdb", "SELECT nope FROM m", "invalid"),
    ("duckdb", "DELETE FROM m", "not read-only"),
    ("duckdb", "SELECT * FROM read_csv('/etc/passwd')", "not read-only"),
    ("duckdb", "COPY m TO '/tmp/never'", "not read-only"),
    ("duckdb", "SET enable_external_access = true", "not read-only"),
    ("duckdb", "SELECT count(*) FROM range(1000000000000)", "timeout"),
    ("duckdb", "SELECT list(a) FROM range(1000000000) t(a)", "memory or timeout"),
    ("cypher", "MATCH (p:Person)-[:ACTED_IN]->(m:Movie) WHERE m.released > 2000 RETURN m.title", "B"),
    ("cypher", "MATCH (m:Movie) WHERE m.title <> 'SET x' RETURN m.title ORDER BY m.title LIMIT 1", "A"),
    ("cypher", "MATCH (set:Movie {title: 'A'})--(:Person) RETURN set.title // SET x", "A"),
    ("cypher", "MATCH (p:Person)--(m) SET m.released = 1 RETURN m", "not read-only"),
    ("cypher", "MATCH (m:Film) RETURN m", "invalid"),
    ("cypher", "MATCH (m:Movie) RETURN m.nope", "invalid"),
    ("cypher", "MATCH (m RETURN m", "invalid"),
    ("cypher", "MATCH (m:Movie) RETURN m; MATCH (m) RETURN m", "invalid"),
    ("cypher", "CREATE (:Movie {title: 'C'})", "not read-only"),
    ("cypher", "MATCH (m:Movie) SET m.released = 1 RETURN m", "not read-only"),
    ("cypher", "LOAD FROM '/etc/passwd' RETURN *", "not read-only"),
    ("cypher", "COPY (MATCH (m:Movie) RETURN m.title) TO '/tmp/never'", "not read-only"),
    ("cypher", "INSTALL httpfs", "not read-only"),
    ("cypher", "UNWIND range(1, 1000000) AS a UNWIND range(1, 1000000) AS b RETURN sum(a * b)", "timeout"),
    ("cypher", "UNWIND range(1, 1000000000) AS a RETURN collect(a)", "memory or timeout"),
]


@pytest.mark.parametrize(("engine", "query", "expected"), CASES)
def test_what_comes_of_a_query(opened: Open, engine: Engine, query: str, expected: str) -> None:
    sandbox = opened(engine)
    started = time.monotonic()
    if expected in ("A", "B"):
        assert sandbox.run(query).rows == ((expected,),)
    else:
        with pytest.raises(QueryFailed) as caught:
            sandbox.run(query)
        # The machine's speed decides which limit an expensive query reaches first.
        assert caught.value.kind in expected.split(" or "), caught.value
    # Two seconds of grace, one to restart a process, the rest for a busy machine.
    assert time.monotonic() - started < SECONDS + 10
    assert sandbox.run(WHOLE[engine]).rows == ((2,),), "the engine is as good as before"
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_bounded(opened: Open, engine: Engine) -> None:
    sandbox = opened(engine)
    everything = {"cypher": "MATCH (m:Movie) RETURN m.title"}.get(sandbox.engine, "SELECT title FROM m")
    result = sandbox.run(everything, most=1)
    assert len(result.rows) == 1 and result.more
    assert not sandbox.run(everything, most=2).more


@pytest.mark.parametrize("engine", ENGINES)
def test_the_schema_names_all_there_is(opened: Open, engine: Engine) -> None:
    sandbox = opened(engine)
    schema = sandbox.schema(1)
    names = ("Movie", "title", "ACTED_IN", "(:Person)-[:ACTED_IN]->(:Movie)") if sandbox.engine == "cypher" else ("m",)
    assert all(name in schema for name in names)
    assert "A" in schema and "released" in schema


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_killed_comes_back(opened: Open, engine: Engine) -> None:
    sandbox = opened(engine)
    sandbox.run(WHOLE[sandbox.engine])
    assert sandbox._process is not None
    sandbox._process.kill()
    sandbox._process.wait()
    with pytest.raises(QueryFailed, match="crashed the engine") as caught:
        sandbox.run(WHOLE[sandbox.engine])
    assert caught.value.kind == "crash"
    assert sandbox.run(WHOLE[sandbox.engine]).rows == ((2,),)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_process_has_no_secrets(opened: Open, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = opened(engine)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    sandbox.close()
    sandbox.run(WHOLE[sandbox.engine])
    assert sandbox._process is not None
    assert b"sk-secret" not in Path(f"/proc/{sandbox._process.pid}/environ").read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_script_is_told(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"NODE|TABEL"):
        make_database(engine, tmp_path / "db", "CREATE NODE TABEL x")
    with pytest.raises(DatabaseError, match="can't be opened"):
        Sandbox(engine, tmp_path / "none").run("SELECT 1")
