"""Copy or create the database of a stage's queries in a directory of the worker."""

from __future__ import annotations

from pathlib import Path

import fsspec

from finetune_api.problems import Problem
from finetune_api.stages import Database, GraphDatabase
from finetune_trainer.data.sources import resolve
from finetune_trainer.errors import UserError
from finetune_trainer.queries.engines import installed
from finetune_trainer.queries.graph_schema import SchemaError, read_schema, statements
from finetune_trainer.queries.result import Engine
from finetune_trainer.queries.sandbox import DatabaseError, Sandbox, make_database


def engine_of(database: Database | GraphDatabase) -> Engine:
    """Return the engine that runs the database's queries."""
    return database.engine if isinstance(database, Database) else "cypher"


def open_sandbox(database: Database | GraphDatabase, where: str, base_dir: Path, scratch: Path) -> Sandbox:
    """Return a sandbox for queries on the database.

    Args:
        where: its path in the job, such as `stages[0].synthesize.text2sql.database`.
        scratch: a directory that nothing else writes to.

    Raises:
        UserError: a file is missing or invalid, or the statements are invalid.
    """
    engine, path = engine_of(database), scratch / "database"
    if not installed(engine):
        raise UserError(
            [Problem(where, f"the engine for {engine} is not installed: install finetune-operator[trainer]")]
        )
    field, text = _script(database, where, base_dir)
    try:
        if text is None:
            scratch.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_read(str(database.file), f"{where}.file", base_dir))
        else:
            make_database(engine, path, text)
        sandbox = Sandbox(engine, path, database.timeout_seconds)
        if not sandbox.schema(0).strip():
            raise DatabaseError("it has no tables")
    except DatabaseError as error:
        raise UserError([Problem(f"{where}.{field}", str(error))]) from error
    return sandbox


def schema_text(database: Database | GraphDatabase, sandbox: Sandbox, samples: int, base_dir: Path) -> str:
    """Return the schema for the teacher: the text of the job's schema file, or the engine's description."""
    if isinstance(database, GraphDatabase) and database.schema_file is not None:
        text = _read(database.schema_file, "schemaFile", base_dir).decode("utf-8").strip()
        return text if not text.startswith("{") else sandbox.schema(samples)
    return sandbox.schema(samples)


def _script(database: Database | GraphDatabase, where: str, base_dir: Path) -> tuple[str, str | None]:
    """Return the field that defines the database, and the statements that create it (None for a database file)."""
    if isinstance(database, GraphDatabase) and database.schema_file is not None:
        text = _decoded(database.schema_file, f"{where}.schemaFile", base_dir)
        try:
            return "schemaFile", statements(read_schema(text))
        except SchemaError as error:
            raise UserError([Problem(f"{where}.schemaFile", f"{database.schema_file} {error}")]) from error
    if database.script is not None:
        return "script", _decoded(database.script, f"{where}.script", base_dir)
    if isinstance(database, Database):
        return ("sql", database.sql) if database.sql is not None else ("file", None)
    return ("cypher", database.cypher) if database.cypher is not None else ("file", None)


def _decoded(path: str, where: str, base_dir: Path) -> str:
    try:
        return _read(path, where, base_dir).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError([Problem(where, f"{path} is not UTF-8 text: {error.reason}")]) from error


def _read(path: str, where: str, base_dir: Path) -> bytes:
    url = resolve(path, base_dir)
    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except (OSError, ImportError, ValueError) as error:
        raise UserError([Problem(where, f"{path} can't be read: {error}")]) from error
