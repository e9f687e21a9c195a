"""Every file format and packing mode yields the same rows, and reading can resume at any row."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data.data_cases import write_jsonl

from finetune_trainer.data.readers import TEXT_PIECE, DataFile, read_rows
from finetune_trainer.errors import UserError

ROWS = [{"a": f"row {number}", "b": 'a "quoted"\nnew line, é'} for number in range(600)]


def _jsonl(path: Path) -> DataFile:
    return DataFile(str(write_jsonl(path / "x.jsonl", ROWS)), "jsonl")


def _csv(path: Path) -> DataFile:
    with (path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["a", "b"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS)
    return DataFile(str(path / "x.csv"), "csv")


def _parquet(path: Path) -> DataFile:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "x.parquet", row_group_size=250)
    return DataFile(str(path / "x.parquet"), "parquet")


def _packed(ending: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], DataFile]:
    def make(path: Path) -> DataFile:
        packed = path / f"x.jsonl.{ending}"
        packed.write_bytes(compress(Path(_jsonl(path).url).read_bytes()))
        return DataFile(str(packed), "jsonl")

    return make


MAKERS = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "gz": _packed("gz", gzip.compress),
    "bz2": _packed("bz2", bz2.compress),
    "xz": _packed("xz", lzma.compress),
    "zst": _packed("zst", lambda data: bytes(pa.compress(data, "zstd", asbytes=True))),
}


@pytest.mark.parametrize("name", MAKERS)
def test_rows_and_positions(name: str, tmp_path: Path) -> None:
    file = MAKERS[name](tmp_path)
    read = list(read_rows(file))
    assert [row for row, _ in read] == ROWS
    for after in (0, 249, 300, 599):
        assert [row for row, _ in read_rows(file, read[after][1])] == ROWS[after + 1 :]


@pytest.mark.parametrize("text", ["", "one line", "é" * TEXT_PIECE, "line\r\n\n  end \n" * 20_000])
def test_text_is_kept_exactly(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    pieces = [row["text"] for row, _ in read_rows(DataFile(str(path), "text"))]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= TEXT_PIECE for piece in pieces)
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2: malformed JSON"),
        ("x.jsonl", b"[1]\n", "line 1: got a list"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the header has 2"),
        ("x.jsonl", b'{"a": "\xff"}\n', "line 1: not UTF-8"),
        ("x.parquet", b"nothing", "not a readable parquet"),
        ("x.jsonl.gz", b"nothing", "not a readable jsonl"),
    ],
)
def test_malformed_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(DataFile(str(tmp_path / name), name.split(".")[1])))
