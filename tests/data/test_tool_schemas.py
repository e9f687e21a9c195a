"""The tools of a row: schemas in one normalised form, and rows that tables store with nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data.data_cases import write_jsonl

from finetune_api.data import DataSpec
from finetune_trainer.data import Kind
from finetune_trainer.data.preparation import open_table
from finetune_trainer.data.prompts import prompt_of
from finetune_trainer.data.row_formats import FormError, normalise
from finetune_trainer.data.tools import read_tools

ASK, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"enum": [1, None]}}, "required": ["a"]},
    },
}
SPEC = DataSpec.model_validate({"sources": [{"inline": [{"text": "x"}]}]})


@pytest.mark.parametrize(
    "given",
    [
        [WEATHER],
        WEATHER,
        [WEATHER["function"]],
        [{"type": "function", **WEATHER["function"]}],
        '[{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}]',
        ['{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}', None],
        [{"name": "weather", "parameters": '{"type": "object", "properties": {"city": {"type": "string"}}}'}],
        [
            {
                "name": "weather",
                "description": None,
                "parameters": {**WEATHER["function"]["parameters"], "required": None},
            }
        ],
    ],
)
def test_schemas(given: Any) -> None:
    assert read_tools(given, "tools") == [WEATHER]


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null", [None]])
def test_no_tools(nothing: Any) -> None:
    assert normalise({"messages": [ASK, REPLY], "tools": nothing}, SPEC, "sft") == {"messages": [ASK, REPLY]}


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("weather", "tools is a string that is not JSON.*set `columns: {tools: none}`"),
        ([{"type": "web_search"}], r"tools\[0\] has no `name`: expected"),
        ([3], r"tools\[0\] is a number: expected"),
    ],
)
def test_what_is_no_schema(tools: Any, reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        normalise({"messages": [ASK, REPLY], "tools": tools}, SPEC, "sft")


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"messages": [ASK, REPLY]}, "sft", {}),
        ({"prompt": [ASK], "completion": [REPLY]}, "sft", {}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sft", {}),
        ({"q": "a", "a": "b"}, "sft", {"template": {"prompt": "{q}", "completion": "{a}"}}),
        ({"prompt": [ASK], "chosen": [REPLY], "rejected": [{**REPLY, "content": "c"}]}, "preference", {}),
        ({"prompt": [ASK]}, "prompt", {}),
    ],
)
def test_every_chat_has_its_tools(row: dict[str, Any], kind: Kind, fields: dict[str, Any]) -> None:
    """Tools are in the example and in the prompt for generation, also when the column has another name."""
    spec = DataSpec.model_validate({"sources": SPEC.sources, **fields})
    example = normalise({**row, "tools": [WEATHER]}, spec, kind)
    assert example["tools"] == [WEATHER]
    assert (prompt_of(example) or {})["tools"] == [WEATHER]
    other = DataSpec.model_validate({"sources": SPEC.sources, "columns": {"tools": "functions_json"}, **fields})
    assert normalise({**row, "functions_json": [WEATHER]}, other, kind)["tools"] == [WEATHER]
    assert "tools" not in normalise({**row, "tools": [WEATHER]}, other, kind)


def test_openai_functions() -> None:
    row = {"messages": [ASK, REPLY], "functions": [WEATHER["function"]]}
    assert normalise(row, SPEC, "sft")["tools"] == [WEATHER]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "sft"),
        ({"prompt": "a", "completion": "b"}, "sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_plain_text_has_no_tools(row: dict[str, Any], kind: Kind) -> None:
    with pytest.raises(FormError, match=r"offers tools in column `tools`, but its text is plain"):
        normalise({**row, "tools": [WEATHER]}, SPEC, kind)
    without = DataSpec.model_validate({"sources": SPEC.sources, "columns": {"tools": "none"}})
    assert "tools" not in normalise({**row, "tools": [WEATHER]}, without, kind)
    assert normalise({"text": "a", "tools": "hammer"}, SPEC, "text") == {"text": "a"}


def test_a_misspelt_column_of_tools() -> None:
    spec = DataSpec.model_validate({"sources": SPEC.sources, "columns": {"tools": "tolos"}})
    with pytest.raises(FormError, match="no column `tolos` for the tools: did you mean `tools`"):
        normalise({"messages": [ASK, REPLY], "tools": [WEATHER]}, spec, "sft")


def test_tools_are_in_the_key_of_what_is_stored(tmp_path: Path) -> None:
    """A different tools column gives a different cache entry for the same files."""
    write_jsonl(tmp_path / "x.jsonl", [{"messages": [ASK, REPLY], "tools": [WEATHER], "others": [ADD]}])
    for column, expected in (("tools", [WEATHER]), ("others", [ADD]), ("none", None)):
        spec = DataSpec.model_validate({"sources": [{"file": "x.jsonl"}], "columns": {"tools": column}})
        store = open_table(spec, "sft", "d", tmp_path / "cache", tmp_path, lambda message: None)
        assert store[0].get("tools") == expected


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [_call(name, arguments)]}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}


ROWS: list[dict[str, Any]] = [
    {"messages": [ASK, call("weather", city="Rome"), {"role": "tool", "content": "sunny"}, REPLY], "tools": [WEATHER]},
    {
        "messages": [ASK, call("add", a=1, b={"c": [1.5]}), {"role": "tool", "content": "3"}, REPLY],
        "tools": [ADD, WEATHER],
    },
    {"messages": [ASK, {**REPLY, "weight": 0}, ASK, REPLY]},
]
READ: list[dict[str, Any]] = [*ROWS[:2], {"messages": [ASK, {**REPLY, "train": False}, ASK, REPLY]}]


@pytest.mark.parametrize("format", ["jsonl", "parquet", "json"])
def test_rows_are_stored_as_they_were_written(format: str, tmp_path: Path) -> None:
    """Parquet gives every call the union of all arguments, with null for those that it does not have."""
    path = tmp_path / f"rows.{format}"
    if format == "parquet":
        table = pa.Table.from_pylist(ROWS)
        assert "'city': None" in str(table.to_pylist()[1])
        pq.write_table(table, path)
    else:
        write_jsonl(path, ROWS)
    spec = DataSpec.model_validate({"sources": [{"file": path.name}]})
    store = open_table(spec, "sft", "d", tmp_path / "cache", tmp_path, lambda message: None)
    assert [store[index] for index in range(len(store))] == READ


def test_arrow_maps_are_mappings(tmp_path: Path) -> None:
    """Spark and polars write arguments with arbitrary keys as an Arrow map."""
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(function))])
    talk = [[ASK, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": [("city", "Rome")]}]}]]
    pq.write_table(pa.table({"messages": pa.array(talk, pa.list_(message))}), tmp_path / "x.parquet")
    spec = DataSpec.model_validate({"sources": [{"file": "x.parquet"}]})
    store = open_table(spec, "sft", "d", tmp_path / "cache", tmp_path, lambda message: None)
    made = store[0]["messages"][1]["tool_calls"][0]["function"]
    assert made == {"name": "weather", "arguments": {"city": "Rome"}}
