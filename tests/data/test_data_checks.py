"""Invalid data: what `inspect` reports, and that `prepare` rejects it as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data.data_cases import made, sft, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_trainer.data import Kind, inspect
from finetune_trainer.errors import UserError


def found(data: dict[str, Any], kind: Kind, base: Path) -> str:
    return "\n".join(map(str, inspect(DataSpec.model_validate(data), kind, "d", base)))


def test_good_data_has_no_problems(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    assert found({"sources": [{"file": "x.jsonl"}]}, "text", tmp_path) == ""


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"sources": [{"file": "dta.jsonl"}]}, "sft", "d.sources[0].file: dta.jsonl: no such file"),
        ({"sources": [{"file": "dta.jsonl"}]}, "sft", "did you mean `data.jsonl`?"),
        ({"sources": [{"directory": "nope"}]}, "sft", "no such directory"),
        ({"sources": [{"file": "empty.jsonl"}]}, "sft", "empty.jsonl is empty"),
        ({"sources": [{"file": "odd.bin"}]}, "sft", "is unknown by its suffix"),
        ({"sources": [{"file": "bad.jsonl"}]}, "sft", "line 2: malformed JSON"),
        ({"sources": [{"file": "data.jsonl"}]}, "preference", "no column `chosen`"),
        ({"sources": [{"file": "data.jsonl"}]}, "preference", "The row has `promt`, `completion`"),
        ({"sources": [{"file": "data.jsonl"}]}, "sft", "did you mean `promt`?"),
        ({"sources": [{"file": "data.jsonl"}], "template": {"text": "{completon}"}}, "sft", "mean `completion`?"),
        ({"sources": [{"inline": [{"messages": "hi"}]}]}, "sft", "expected a list of messages"),
        ({"sources": [{"inline": [{"messages": [{"role": "user"}]}]}]}, "sft", "expected `role` and `content`"),
        (
            {"sources": [{"inline": [{"chosen": "a", "rejected": "a"}]}]},
            "preference",
            "chosen equals rejected in 1 of 1",
        ),
        ({"sources": [{"inline": [{"text": "no marker"}]}], "transcript": {}}, "sft", "a transcript must begin with"),
        ({"sources": [{"inline": [{"text": ""}]}]}, "text", "no row has anything to train on"),
        ({"sources": [{"inline": [{"text": "a"}]}], "validationSplit": 0.5}, "text", "d.validationSplit"),
        (
            {"sources": [{"file": "data.jsonl", "join": {"file": "table.jsonl", "key": "completion"}}]},
            "text",
            "d.sources[0].join: 1 of 2 rows find no row",
        ),
        ({"sources": [{"file": "data.jsonl", "join": {"file": "table.jsonl", "key": "x"}}]}, "text", "no column `x`"),
        ({"sources": [{"file": "data.jsonl", "join": {"file": "twice.jsonl", "key": "k"}}]}, "text", "more than once"),
    ],
)
def test_faults_are_named(data: dict[str, Any], kind: Kind, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"promt": "a", "completion": "b"}, {"promt": "c", "completion": "d"}])
    write_jsonl(tmp_path / "table.jsonl", [{"completion": "b", "text": "t"}])
    write_jsonl(tmp_path / "twice.jsonl", [{"k": 1}, {"k": 1}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "odd.bin").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert message in found(data, kind, tmp_path)


def test_all_sources_are_reported_at_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = {"sources": [{"file": "a.jsonl"}, {"directory": "b"}, {"file": "c.csv"}]}
    assert found(data, "sft", tmp_path).count("\n") == 2
    with pytest.raises(UserError) as caught:
        made(sft(data), tokenizer, tmp_path)
    assert len(caught.value.problems) == 3
