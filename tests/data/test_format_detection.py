"""Rows in the formats of other tools are detected and reported in one line, or the error names the settings to add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.data.data_cases import write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.stages import SftSpec
from finetune_trainer.data import Kind, inspect, prepare, reading_notes
from finetune_trainer.data.row_formats import EmptyRow, FormError, normalise, reading

SYSTEM = {"role": "system", "content": "s"}
ASK, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WORSE = {"role": "assistant", "content": "c"}
PLUS = {"role": "user", "content": "Add.\n2+2"}
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def spec_of(**fields: Any) -> DataSpec:
    """Return the spec after a JSON round trip, which sets every field, as workers receive it."""
    spec = DataSpec.model_validate({"sources": [{"inline": [{"text": "x"}]}], **fields})
    return DataSpec.model_validate_json(spec.model_dump_json(by_alias=True))


@pytest.mark.parametrize(
    ("row", "expected", "note"),
    [
        (
            {"instruction": "Add.", "input": "2+2", "output": "4"},
            {"prompt": [PLUS], "completion": [{**REPLY, "content": "4"}], "templated": True},
            "reads Alpaca rows from columns `instruction`, `input` and `output`",
        ),
        (
            {"instruction": "a", "input": "", "output": "b", "history": [], "system": "s"},
            {"prompt": [SYSTEM, ASK], "completion": [REPLY], "templated": True},
            "reads Alpaca rows from columns `instruction`, `input` and `output`, "
            "the system message from column `system`",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["Add.\n2+2", "4"]], "system": "s"},
            {"messages": [SYSTEM, PLUS, {**REPLY, "content": "4"}, ASK, REPLY]},
            "reads Alpaca rows from columns `instruction` and `output`, earlier turns from `history`, "
            "the system message from column `system`",
        ),
        (
            {"conversations": SHARED},
            {"messages": [ASK, REPLY]},
            "reads ShareGPT conversations from column `conversations`",
        ),
        (
            {"conversations": SHARED, "system": "s", "tools": json.dumps([TOOL])},
            {"messages": [SYSTEM, ASK, REPLY], "tools": [TOOL]},
            "reads ShareGPT conversations from column `conversations`, tools from column `tools`, "
            "the system message from column `system`",
        ),
        (
            {"conversation": [ASK, REPLY]},
            {"messages": [ASK, REPLY]},
            "reads conversations from column `conversation`",
        ),
        (
            {"conversations": json.dumps(SHARED)},
            {"messages": [ASK, REPLY]},
            "reads ShareGPT conversations from column `conversations`",
        ),
        ({"messages": json.dumps([ASK, REPLY])}, {"messages": [ASK, REPLY]}, None),
    ],
)
def test_dialogues(row: dict[str, Any], expected: dict[str, Any], note: str | None) -> None:
    assert normalise(row, spec_of(), "sft") == expected
    assert reading(row, spec_of(), "sft") == note


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "c"}},
            "reads the prompt's turns from column `conversations`",
        ),
        ({"messages": [ASK], "chosen": REPLY, "rejected": WORSE}, "reads the prompt's turns from column `messages`"),
        (
            {"instruction": "a", "chosen": "b", "rejected": "c"},
            "reads Alpaca pairs from columns `instruction`, `chosen` and `rejected`",
        ),
    ],
)
def test_pairs(row: dict[str, Any], note: str) -> None:
    """LLaMA-Factory's preference formats are read both for training and as prompts for generation."""
    example = normalise(row, spec_of(), "preference")
    assert (example["prompt"], example["chosen"], example["rejected"]) == ([ASK], [REPLY], [WORSE])
    assert reading(row, spec_of(), "preference") == note
    asked = normalise(row, spec_of(), "prompt")
    assert asked["prompt"] == [ASK] and asked["columns"]["reference"] == "b"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, [ASK]),
        ({"instruction": "a", "answer": "b"}, [ASK]),
        ({"conversations": SHARED}, [ASK]),
    ],
)
def test_prompts(row: dict[str, Any], prompt: list[dict[str, Any]]) -> None:
    assert normalise(row, spec_of(), "prompt")["prompt"] == prompt


def test_what_the_job_names_comes_first() -> None:
    row = {"conversations": SHARED, "instruction": "i", "output": "o", "text": "t", "q": "a", "r": "b"}
    assert normalise(row, spec_of(), "sft") == {"text": "t"}
    named = spec_of(columns={"prompt": "q", "completion": "r"})
    assert normalise(row, named, "sft") == {"prompt": "a", "completion": "b"}
    made = spec_of(template={"prompt": "{q}", "completion": "{r}"})
    assert normalise(row, made, "sft") == {"prompt": [ASK], "completion": [REPLY], "templated": True}
    missing = spec_of(columns={"messages": "dialogue"})
    with pytest.raises(FormError, match="no column `dialogue`"):
        normalise({"conversations": SHARED}, missing, "sft")


@pytest.mark.parametrize(
    ("row", "kind", "line"),
    [
        ({"dialogue": [ASK, REPLY]}, "sft", "columns: {messages: dialogue}"),
        ({"question": "a", "answer": "b"}, "sft", 'template: {prompt: "{question}", completion: "{answer}"}'),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            "sft",
            r'template: {prompt: "{instruction}\n\n{context}", completion: "{response}"}',
        ),
        ({"question": "a", "answer": "b"}, "prompt", "columns: {prompt: question}"),
        ({"title": "x", "content": "a"}, "text", "columns: {text: content}"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference", "columns: {prompt: question}"),
        ({"question": "a", "system": "s", "chosen": "b", "rejected": "c"}, "preference", "columns: {prompt: question}"),
        ({"query": "a", "chosen": [REPLY], "rejected": [WORSE]}, "preference", "columns: {prompt: query}"),
    ],
)
def test_the_line_of_settings_is_named_and_reads(row: dict[str, Any], kind: Kind, line: str) -> None:
    import yaml

    with pytest.raises(FormError) as refused:
        normalise(row, spec_of(), kind)
    assert f"set `{line}`" in str(refused.value)
    assert normalise(row, spec_of(**yaml.safe_load(line)), kind)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": ["b", "c"]}, "`output` is a list, expected a string"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "`history` is a list, expected a list of pairs"),
        ({"conversations": [{"from": "human", "value": None}]}, r"value is empty \(null\)"),
    ],
)
def test_recognised_rows_that_can_not_be_read(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        normalise(row, spec_of(), "sft")
    with pytest.raises(EmptyRow):
        normalise({"instruction": "a", "output": ""}, spec_of(), "sft")


def test_a_question_that_the_answers_repeat_is_their_prompt() -> None:
    row = {"question": "a?", "chosen": "Q: a? A: b", "rejected": "Q: a? A: c"}
    assert normalise(row, spec_of(), "preference")["prompt"] == "Q: a? A:"
    chats = {"question": "short", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]}
    assert normalise(chats, spec_of(), "preference")["prompt"] == [ASK]


def test_it_is_told_once_per_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"conversations": SHARED}] * 3)
    write_jsonl(tmp_path / "y.jsonl", [{"instruction": "a", "output": "b"}, {"text": "x"}])
    write_jsonl(tmp_path / "z.jsonl", [{"messages": [ASK, REPLY]}])
    data = {"sources": [{"file": f"{name}.jsonl"} for name in "xyz"]}
    told = [
        "d.sources[0]: reads ShareGPT conversations from column `conversations`",
        "d.sources[1]: reads Alpaca rows from columns `instruction` and `output`",
    ]
    spec = DataSpec.model_validate(data)
    assert not inspect(spec, "sft", "d", tmp_path)
    assert reading_notes(spec, "sft", "d", tmp_path) == told
    for streaming in (False, True):
        log: list[str] = []
        stage = SftSpec.model_validate({"data": {**data, "streaming": streaming}, "maxSteps": 1})
        prepare(stage, tokenizer, 64, "s", tmp_path / "cache", tmp_path, 1, log.append)
        assert [line for line in log if "reads" in line] == [line.replace("d.", "s.data.") for line in told]
