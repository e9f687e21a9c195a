"""Record which cache directories this process has used for a job's data, and which tables another process provides.

A node that gets prepared data from another node does not read the sources again: the other node sends the names of the
directories, and `preparation.open_table` looks them up here first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api.data import DataSpec
from finetune_trainer.data.cache_keys import hash_of
from finetune_trainer.data.row_formats import Kind

ROWS, PREPARED = "rows", "prepared"
"""Directories of the cache: tables of rows, and rows as tokens."""


@dataclass(frozen=True)
class Places:
    """Directories of the cache, by name."""

    tables: dict[str, str] = field(default_factory=dict)
    """The directory below `rows` of each table, by `table_name`."""
    prepared: tuple[str, ...] = ()
    """Directories below `prepared`."""

    @property
    def paths(self) -> list[str]:
        """Return the distinct paths relative to the cache."""
        rows = [f"{ROWS}/{name}" for name in self.tables.values()]
        return list(dict.fromkeys([*rows, *(f"{PREPARED}/{name}" for name in self.prepared)]))


_used = Places()


def table_name(spec: DataSpec, kind: Kind) -> str:
    """Return a name for the table of a data spec, derived without reading its sources."""
    return hash_of(spec.to_json(), kind)


def note_table(spec: DataSpec, kind: Kind, directory: str) -> None:
    """Record the directory of a table that this process has opened."""
    _used.tables[table_name(spec, kind)] = directory


def note_prepared(directory: str) -> None:
    """Record a directory of prepared rows that this process has opened."""
    global _used
    _used = Places(_used.tables, tuple(dict.fromkeys([*_used.prepared, directory])))


def named_table(spec: DataSpec, kind: Kind) -> str | None:
    """Return the directory of a table that another process has provided, or None."""
    return _named.get(table_name(spec, kind))


def use_tables(tables: dict[str, str]) -> None:
    """Open these tables from now on without reading their sources."""
    _named.update(tables)


def places_used() -> Places:
    """Return the directories that this process has opened so far."""
    return Places(dict(_used.tables), _used.prepared)


_named: dict[str, str] = {}
