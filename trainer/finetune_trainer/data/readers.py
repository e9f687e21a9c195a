"""Read rows of one file one at a time in constant memory, each with a position from which reading can continue."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.problems import Problem
from finetune_trainer.data.json_files import HEAD, JsonFault, Layout, layout_of, read_values, rows_within
from finetune_trainer.data.json_values import kind_name
from finetune_trainer.errors import UserError

Row = dict[str, Any]

TEXT_PIECE = 64 * 1024
"""Maximum bytes of a document: a longer text file is cut at line ends."""
PARQUET_BATCH = 256
OTHER_SEPARATORS = ";\t|"
"""Column separators of files that are named csv but have no commas."""

csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Position:
    """A position between two rows: `offset` in bytes of the decompressed file (parquet: in rows), `line` from 0."""

    offset: int = 0
    line: int = 0


START = Position()
Rows = Iterator[tuple[Row, Position]]


@dataclass(frozen=True)
class DataFile:
    """A file of known format; `url` is a local path or a URI that fsspec supports."""

    url: str
    format: str


def open_binary(url: str) -> BinaryIO:
    """Open a file for reading; it is decompressed according to its suffix (`.gz`, `.bz2`, `.xz`, `.zst`).

    Raises:
        OSError: it can't be opened.
    """
    raw = fsspec.open(url, "rb").open()
    if url.endswith(".gz"):
        return cast(BinaryIO, gzip.open(raw))
    if url.endswith(".bz2"):
        return cast(BinaryIO, bz2.open(raw))
    if url.endswith(".xz"):
        return cast(BinaryIO, lzma.open(raw))
    if url.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return cast(BinaryIO, raw)


def read_rows(file: DataFile, start: Position = START) -> Rows:
    """Yield rows from `start` on, each with the position after it.

    A compressed file is decompressed up to `start`, but not parsed.

    Raises:
        UserError: the file is malformed; the message has its name, the line and the reason.
        OSError: it can't be read.
    """
    try:
        yield from READERS[file.format](file, start)
    except JsonFault as error:
        raise UserError([Problem("", f"{file.url}, row {error.row}: {error}")]) from error
    except (pa.ArrowInvalid, EOFError, gzip.BadGzipFile, lzma.LZMAError, csv.Error) as error:
        raise UserError([Problem("", f"{file.url}: not a readable {file.format} file: {error}")]) from error


def _lines(stream: BinaryIO, file: DataFile, start: Position) -> Iterator[tuple[str, Position]]:
    _skip(stream, start.offset)
    position = start
    while raw := stream.readline():
        position = Position(position.offset + len(raw), position.line + 1)
        yield _decode(raw, file, position.line), position


def _skip(stream: BinaryIO, offset: int) -> None:
    """Move a newly opened stream to an offset; zstd streams can't seek, so they are read up to it."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset and (block := stream.read(min(offset, 1 << 20))):
        offset -= len(block)


def _decode(raw: bytes, file: DataFile, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 and file.format != "text" else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError([Problem("", f"{file.url}, line {line}: not UTF-8 text: {error.reason}")]) from error


def unit_of(file: DataFile) -> str:
    """Return the unit of positions for messages: `line` or `row`."""
    return "row" if file.format == "parquet" or (file.format == "json" and _layout(file) != "lines") else "line"


def _layout(file: DataFile) -> Layout:
    with open_binary(file.url) as stream:
        return layout_of(stream.read(HEAD))


def _read_json(file: DataFile, start: Position) -> Rows:
    layout = _layout(file)
    if layout == "lines":
        yield from _read_jsonl(file, start)
    elif layout == "array" or start.offset:
        yield from _read_values(file, layout, start)
    else:
        yield from _rows_of_object(file, start)


def _read_values(file: DataFile, layout: Layout, start: Position) -> Rows:
    with open_binary(file.url) as stream:
        _skip(stream, start.offset)
        for value, offset, row in read_values(stream, layout, start.offset, start.line):
            yield _object(value, row), Position(offset, row)


def _rows_of_object(file: DataFile, start: Position) -> Rows:
    """Yield the rows that a file's only object holds, or each object of the file.

    Positions in the former case have offset 0 and a count of rows.
    """
    values = _read_values(file, "values", START)
    first, second = next(values, None), next(values, None)
    within = rows_within(first[0]) if first and not second else None
    if within is not None:
        yield from ((_object(row, at), Position(0, at)) for at, row in enumerate(within[start.line :], start.line + 1))
    elif not start.line:
        yield from (one for one in (first, second) if one)
        yield from values


def _object(value: Any, row: int) -> Row:
    if not isinstance(value, dict):
        raise JsonFault(row, f"got {kind_name(value)}, expected an object")
    return value


def _read_jsonl(file: DataFile, start: Position) -> Rows:
    with open_binary(file.url) as stream:
        for line, position in _lines(stream, file, start):
            if line.strip():
                yield _parse_json(line, file, position.line), position


def _parse_json(line: str, file: DataFile, number: int) -> Row:
    where = f"{file.url}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "; one JSON object per line is expected, or `format: json`" if line.strip() in ("[", "{") else ""
        raise UserError([Problem("", f"{where}: malformed JSON: {error}{hint}")]) from error
    if not isinstance(row, dict):
        hint = " (`format: json` reads an array)" if isinstance(row, list) else ""
        raise UserError([Problem("", f"{where}: got {kind_name(row)}, expected one JSON object per line{hint}")])
    return row


def _read_csv(file: DataFile, start: Position) -> Rows:
    header, first = next(_csv_records(file, START), ([], START))
    _check_header(header, file)
    for fields, position in _csv_records(file, first if start == START else start):
        if fields:
            yield _csv_row(header, fields, file, position.line), position


def _check_header(header: list[str], file: DataFile) -> None:
    where = f"{file.url}, line 1"
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError([Problem("", f"{where}: the column `{twice[0]}` appears more than once")])
    other = next((mark for mark in OTHER_SEPARATORS if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        message = f"{where}: the header is one column, `{header[0]}`: expected commas between columns, not {other!r}"
        raise UserError([Problem("", message)])


def _csv_records(file: DataFile, start: Position) -> Iterator[tuple[list[str], Position]]:
    """Yield records, which may span lines, each with the position after its last line."""
    reached = start

    def lines(stream: BinaryIO) -> Iterator[str]:
        nonlocal reached
        for line, position in _lines(stream, file, start):
            reached = position
            yield line

    with open_binary(file.url) as stream:
        for fields in csv.reader(lines(stream), strict=True):
            yield fields, reached


def _csv_row(header: list[str], fields: list[str], file: DataFile, line: int) -> Row:
    if len(fields) != len(header):
        message = f"{file.url}, line {line}: {len(fields)} fields, but the header has {len(header)} columns"
        raise UserError([Problem("", message)])
    return dict(zip(header, fields, strict=True))


def _read_parquet(file: DataFile, start: Position) -> Rows:
    with open_binary(file.url) as stream:
        table = pq.ParquetFile(stream)
        done = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if done + size > start.offset:
                yield from _row_group(table, group, done, start.offset)
            done += size


def _row_group(table: pq.ParquetFile, group: int, done: int, skip_to: int) -> Rows:
    number = done
    for batch in table.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group]):
        first = min(max(skip_to - number, 0), len(batch))
        number += first
        for row in batch.slice(first).to_pylist(maps_as_pydicts="lossy"):
            number += 1
            yield row, Position(number, number)


def _read_text(file: DataFile, start: Position) -> Rows:
    with open_binary(file.url) as stream:
        _skip(stream, start.offset)
        offset, line, rest = start.offset, start.line, b""
        while chunk := rest + stream.read(TEXT_PIECE - len(rest)):
            piece = chunk if len(chunk) < TEXT_PIECE else chunk[: _cut(chunk)]
            rest = chunk[len(piece) :]
            offset, line = offset + len(piece), line + piece.count(b"\n")
            yield {"text": _decode(piece, file, line)}, Position(offset, line)


def _cut(chunk: bytes) -> int:
    """Return where to end a piece: after its last line end, else before a character that may be incomplete."""
    end = chunk.rfind(b"\n") + 1
    if end:
        return end
    end = len(chunk) - 1
    while end > 1 and chunk[end] & 0xC0 == 0x80:
        end -= 1
    return end


READERS: dict[str, Callable[[DataFile, Position], Rows]] = {
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
}
