"""Layouts of `.json` files: an array, an object that holds one, objects over many lines, one object per line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from finetune_api.data import DataSpec
from finetune_trainer.data import inspect
from finetune_trainer.data.json_files import HEAD
from finetune_trainer.data.readers import DataFile, read_rows
from finetune_trainer.data.sources import find_files, locate, source_rows
from finetune_trainer.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"n": number, "text": 'é "x"\\\n\u2028😀' * (number % 7 * 40), "deep": {"x": [1, {"y": None}]}}
    for number in range(400)
]
LAYOUTS = {
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array with a mark": "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
    "under a key": json.dumps({"version": "1.0", "data": ROWS, "license": {"name": "x"}}, indent=1),
    "under a key in one line": json.dumps({"data": ROWS}),
    "objects over many lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_positions(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(LAYOUTS[layout])
    file = DataFile(str(path), "json")
    read = list(read_rows(file))
    assert [row for row, _ in read] == ROWS
    for after in (0, 1, 250, 399):
        assert [row for row, _ in read_rows(file, read[after][1])] == ROWS[after + 1 :]
    located, _ = locate(DataSpec.model_validate({"sources": [{"file": str(path)}]}), "d", tmp_path)
    places = [place for _, _, place in source_rows(located[0], 0)]
    assert places[1] == f"{path}, {'line' if layout == 'lines' else 'row'} 2"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"a": 1}, {"a" 2}]', "row 2: malformed JSON: Expecting ':' delimiter"),
        ('[{"a": 1},', "row 1: the file ends before its array does"),
        ('[{"a": "x]', "row 1: malformed JSON: Unterminated string"),
        ('[{"a": 1}] [', "row 1: text follows the end of the array"),
        ('[{"a": 1}, [2]]', "row 2: got a list, expected an object"),
        ('{"a":\n1}\n7', "row 2: got a number, expected an object"),
        ('{"a": 1}\n{"a":', "line 2: malformed JSON"),
    ],
)
def test_malformed_files_are_named(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=reason):
        list(read_rows(DataFile(str(tmp_path / "x.json"), "json")))
    found = inspect(DataSpec.model_validate({"sources": [{"file": "x.json"}]}), "text", "d", tmp_path)
    assert any(str(problem).startswith("d.sources[0]") for problem in found)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        {"prompt": "x", "documents": [{"title": "y"}]},
        {"dialogue": [{"role": "user", "content": "x"}], "documents": [{"title": "y"}]},
        {"first": [{"a": 1}], "second": [{"a": 2}]},
    ],
)
def test_one_object_is_one_row_unless_it_is_sure_to_hold_the_rows(row: dict[str, Any], tmp_path: Path) -> None:
    for text in (json.dumps(row), json.dumps(row, indent=1)):
        (tmp_path / "x.json").write_text(text)
        assert [read for read, _ in read_rows(DataFile(str(tmp_path / "x.json"), "json"))] == [row]


def test_an_array_takes_no_more_memory_than_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 100_000}) for _ in range(200)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(DataFile(str(path), "json"))) == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * HEAD < path.stat().st_size


def test_formats_of_names(tmp_path: Path) -> None:
    """`.json` files contain JSON lines as often as arrays, so a directory of both is one table."""
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')

    def rows(**source: Any) -> list[str]:
        located, problems = locate(DataSpec.model_validate({"sources": [source]}), "d", tmp_path)
        assert not problems
        return [row["text"] for row, _, _ in source_rows(located[0], 0)]

    assert rows(directory=".") == ["a", "b"]
    assert rows(directory=".", format="json") == ["a"]
    (tmp_path / "c.data").write_text('[{"text": "c"}]')
    assert rows(file="c.data", format="json") == ["c"]
    assert [file.format for file in find_files(str(tmp_path), "directory", "jsonl", "d", tmp_path)] == ["jsonl"] * 2
    with pytest.raises(UserError, match=r"line 1: got a list.*`format: json` reads an array"):
        rows(file="a.json", format="jsonl")
