"""Find the files of a spec's sources, read their rows, and join them with a second table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from finetune_api.claims import mounted
from finetune_api.data import DataSource, DataSpec, Join
from finetune_api.problems import Problem, did_you_mean
from finetune_trainer.data.readers import START, DataFile, Position, Row, read_rows, unit_of
from finetune_trainer.errors import Outage, UserError
from finetune_trainer.hub import hub_access

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Cursor:
    """A position in a spec's table: the source, its file, and the position in that file."""

    source: int = 0
    file: int = 0
    position: Position = START

    def to_json(self) -> list[int]:
        """Return the cursor as JSON values."""
        return [self.source, self.file, self.position.offset, self.position.line]

    @classmethod
    def from_json(cls, values: list[int]) -> Cursor:
        """Return the cursor from the values of `to_json`."""
        return cls(values[0], values[1], Position(values[2], values[3]))


@dataclass(frozen=True)
class Located:
    """One source with its files (empty for inline and hub rows) and its join table."""

    source: DataSource
    files: list[DataFile]
    joined: dict[str, Row] | None


def resolve(path: str, base_dir: Path) -> str:
    """Return an absolute path or URI; a relative path starts at `base_dir` or, if only that exists, at the cwd."""
    path = os.path.expanduser(mounted(path))
    if "://" in path or os.path.isabs(path):
        return path
    first = os.path.join(base_dir, path)
    exists = bool(path) and (os.path.exists(first) or any(True for _ in Path(base_dir).glob(path)))
    return os.path.abspath(first if exists or not _exists_in_cwd(path) else path)


def _exists_in_cwd(path: str) -> bool:
    return os.path.exists(path) or any(True for _ in Path().glob(path))


def locate(spec: DataSpec, where: str, base_dir: Path) -> tuple[list[Located], list[Problem]]:
    """Return every source with its files, and the problems; a source with problems is left out."""
    located: list[Located] = []
    problems: list[Problem] = []
    for index, source in enumerate(spec.sources):
        try:
            located.append(locate_source(source, f"{where}.sources[{index}]", base_dir))
        except UserError as error:
            problems += error.problems
    return located, problems


def locate_source(source: DataSource, where: str, base_dir: Path) -> Located:
    """Return a source with its files.

    Raises:
        UserError: files or the join table are missing or unreadable.
    """
    joined = read_join(source.join, f"{where}.join", base_dir) if source.join else None
    if source.inline is not None or source.hub is not None:
        return Located(source, [], joined)
    kind = next(name for name in ("file", "directory", "uri") if getattr(source, name) is not None)
    return Located(source, find_files(getattr(source, kind), kind, source.format, where, base_dir), joined)


def find_files(path: str, kind: str, format: str, where: str, base_dir: Path) -> list[DataFile]:
    """Return the files of a path, a glob, a directory or a URI, in order of name.

    Raises:
        UserError: no file exists, or a file's format is unknown.
    """
    field = f"{where}.{kind}"
    url = resolve(path, base_dir)
    directory = kind == "directory" or (kind == "uri" and url.endswith("/"))
    try:
        found = _list(url, directory)
    except Exception as error:  # each storage client raises errors of other types
        raise UserError([Problem(field, f"{path}: can't be reached: {error}")]) from error
    if not found:
        raise UserError([Problem(field, _missing(path, url, directory))])
    return _with_formats(found, format, directory, where, field)


def _list(url: str, directory: bool) -> list[str]:
    fs, path = fsspec.core.url_to_fs(url)
    if directory:
        names = [name for name in fs.find(path) if not os.path.basename(name).startswith(".")]
    elif any(mark in path for mark in "*?["):
        names = [name for name in fs.glob(path) if fs.isfile(name)]
    else:
        names = [path] if _is_file(fs, path) else []
    return sorted(str(fs.unstrip_protocol(name)) if "://" in url else str(name) for name in names)


def _is_file(fs: Any, path: str) -> bool:
    """Return whether a file exists; unlike fsspec's `isfile`, raise if the store is unreachable or denies access."""
    try:
        return str(fs.info(path)["type"]) == "file"
    except FileNotFoundError:
        return False


def _missing(path: str, url: str, directory: bool) -> str:
    if directory:
        return f"{path}: no files in {url}" if os.path.isdir(url) else f"{path}: no such directory ({url})"
    if os.path.isdir(url):
        return f"{path} is a directory: use `directory:` in place of `file:`"
    parent = os.path.dirname(url)
    if "://" in url or not os.path.isdir(parent):
        return f"{path}: no such file ({url})"
    return f"{path}: no such file ({url}){did_you_mean(os.path.basename(url), _shown(os.listdir(parent)))}"


def _shown(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))[:20]


def format_of(name: str) -> str | None:
    """Return the format by a file's suffix, compression aside; None if the suffix is unknown."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSED:
        ending = os.path.splitext(stem)[1]
    return SUFFIXES.get(ending)


def _has_suffix_of(name: str, format: str) -> bool:
    """Return whether a file has a suffix of the format. JSON Lines files are often named `.json`."""
    return format_of(name) == format or (format == "jsonl" and format_of(name) == "json")


def _with_formats(found: list[str], format: str, directory: bool, where: str, field: str) -> list[DataFile]:
    if format != "auto":
        matching = [name for name in found if _has_suffix_of(name, format)] if directory else found
        return [DataFile(name, format) for name in matching or found]
    known = [DataFile(name, ending) for name in found if (ending := format_of(name))]
    if not known or (not directory and len(known) < len(found)):
        odd = next(name for name in found if format_of(name) is None)
        raise UserError([Problem(f"{where}.format", f"the format of {odd} is unknown by its suffix: set format")])
    formats = sorted({file.format for file in known})
    if len(formats) > 1 and formats != ["json", "jsonl"]:
        raise UserError([Problem(field, f"holds files of several formats ({', '.join(formats)}): set format")])
    return known


def read_join(join: Join, where: str, base_dir: Path) -> dict[str, Row]:
    """Return the rows of the join table by their key as text.

    Raises:
        UserError: the table is missing, lacks the key column, or has a key twice.
    """
    files = find_files(join.file, "file", join.format, where, base_dir)
    table: dict[str, Row] = {}
    for row in (row for file in files for row, _ in read_rows(file)):
        if join.key not in row:
            raise UserError(
                [Problem(f"{where}.key", f"{join.file} has no column `{join.key}`{did_you_mean(join.key, row)}")]
            )
        if str(row[join.key]) in table:
            raise UserError(
                [Problem(f"{where}.key", f"{join.file} has `{join.key}` = {row[join.key]!r} more than once")]
            )
        table[str(row[join.key])] = row
    if not table:
        raise UserError([Problem(f"{where}.file", f"{join.file} has no rows")])
    return table


def join_row(row: Row, located: Located, where: str) -> Row:
    """Return the row with the join table's columns; for a column of both, the row's value is kept.

    Raises:
        UserError: the row has no key column, or the key is not in the join table.
    """
    join = located.source.join
    if join is None or located.joined is None:
        return row
    if join.key not in row:
        raise UserError([Problem(f"{where}.join.key", f"no column `{join.key}`{did_you_mean(join.key, row)}")])
    other = located.joined.get(str(row[join.key]))
    if other is None:
        raise UserError([Problem(f"{where}.join", f"{join.file} has no row with `{join.key}` = {row[join.key]!r}")])
    return {**other, **row}


def source_rows(
    located: Located, index: int, start: Cursor = Cursor(), streaming: bool = False
) -> Iterator[tuple[Row, Cursor, str]]:
    """Yield rows of one source from `start` on, before the join: (row, cursor after it, its location for messages).

    Args:
        streaming: whether a hub dataset is read row by row over the network, without a download.
    """
    if located.files:
        yield from _file_rows(located.files, index, start)
        return
    skip = start.position.offset
    inline = located.source.inline
    rows = iter(inline[skip:]) if inline is not None else hub_rows(located.source, skip, streaming)
    for number, row in enumerate(rows, skip):
        yield dict(row), Cursor(index, 0, Position(number + 1, number + 1)), f"row {number}"


def _file_rows(files: list[DataFile], index: int, start: Cursor) -> Iterator[tuple[Row, Cursor, str]]:
    for number, file in enumerate(files[start.file :], start.file):
        first = start.position if number == start.file else START
        unit = ""
        for row, position in read_rows(file, first):
            unit = unit or unit_of(file)
            yield row, Cursor(index, number, position), f"{file.url}, {unit} {position.line}"


def hub_dataset(source: DataSource, streaming: bool) -> Any:
    """Return the hub dataset's split, through `datasets`.

    Raises:
        UserError: it can't be loaded (no such dataset, no access, or offline mode and not in the cache).
        Outage: the hub does not answer.
    """
    from datasets import load_dataset

    assert source.hub is not None
    try:
        with hub_access(source.hub, "", source.revision, "dataset"):
            return load_dataset(
                source.hub,
                source.subset,
                split=source.split,
                revision=source.revision,
                streaming=streaming,
                trust_remote_code=False,
            )
    except (Outage, UserError):
        raise
    except Exception as error:  # datasets raises many types; only the text helps a user
        message = f"hub dataset {source.hub} can't be loaded: {type(error).__name__}: {error}"
        raise UserError([Problem("", message)]) from error


def hub_rows(source: DataSource, skip: int, streaming: bool) -> Iterator[Row]:
    data = hub_dataset(source, streaming)
    return iter(data.skip(skip) if skip else data)
