"""Prompts from every row format, and the extra columns that reward functions may read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.stages import RlhfSpec
from finetune_trainer.data import eval_prompts, inspect, prepare
from finetune_trainer.data.checks import column_problems
from finetune_trainer.data.row_formats import EmptyRow, FormError, normalise
from finetune_trainer.errors import UserError

ASK, REPLY = {"role": "user", "content": "2 plus 2"}, {"role": "assistant", "content": "makes 4"}
SYSTEM = {"role": "system", "content": "count"}


def _spec(rows: list[dict[str, Any]], **fields: Any) -> DataSpec:
    return DataSpec.model_validate({"sources": [{"inline": rows}], "shuffle": False, **fields})


@pytest.mark.parametrize(
    ("row", "fields", "prompt", "columns"),
    [
        ({"prompt": "2 plus", "answer": "4"}, {}, "2 plus", {"answer": "4"}),
        ({"prompt": "a", "completion": "b", "id": 3}, {}, "a", {"id": 3, "reference": "b"}),
        ({"prompt": [ASK], "answer": 4}, {}, [ASK], {"answer": 4}),
        ({"messages": [ASK, REPLY]}, {}, [ASK], {"reference": "makes 4"}),
        ({"messages": [ASK, REPLY, ASK]}, {}, [ASK, REPLY, ASK], {}),
        ({"messages": [ASK, REPLY, ASK, REPLY]}, {}, [ASK, REPLY, ASK], {"reference": "makes 4"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "a", {"chosen": "b", "rejected": "c", "reference": "b"}),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "n": 1},
            {"transcript": {}},
            [{"role": "user", "content": "a"}],
            None,
        ),
        ({"q": "a", "a": "b"}, {"template": {"system": "count", "prompt": "{q}", "completion": "{a}"}}, None, None),
        ({"frage": "a", "prompts": "no"}, {"columns": {"prompt": "frage"}}, "a", {}),
    ],
)
def test_forms(row: dict[str, Any], fields: dict[str, Any], prompt: Any, columns: dict[str, Any] | None) -> None:
    example = normalise(row, _spec([row], **fields), "prompt")
    assert example["prompt"] == (prompt or [SYSTEM, {"role": "user", "content": "a"}])
    assert example["columns"] == columns if columns is not None else example["columns"]["reference"] == "b"


def test_rows_without_a_prompt() -> None:
    with pytest.raises(FormError, match=r"no column `prompt`: did you mean `promt`\?.*`messages`, or `chosen`"):
        normalise({"promt": "a"}, _spec([{"a": 1}]), "prompt")
    with pytest.raises(EmptyRow):
        normalise({"prompt": ""}, _spec([{"a": 1}]), "prompt")


def _stage(rows: list[dict[str, Any]], **fields: Any) -> RlhfSpec:
    data = {"sources": [{"inline": rows}], "shuffle": False}
    common = {"data": data, "rewards": [{"exactMatch": "answer"}], "generation": {"maxNewTokens": 16}}
    return RlhfSpec.model_validate({**common, **fields})


def _prepare(stage: RlhfSpec, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context: int | None = 96) -> Any:
    return prepare(stage, tokenizer, context, "stages[0].rlhf", tmp_path / "cache", tmp_path, 1)


def test_prepared_prompts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Prepared prompts end where the answer begins, and keep their columns."""
    prepared = _prepare(_stage([{"messages": [ASK, REPLY], "answer": "4 é"}]), tokenizer, tmp_path)
    row = prepared.train[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\n2 plus 2<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads(row["row"]) == {"prompt": [ASK], "columns": {"answer": "4 é", "reference": "makes 4"}}
    assert prepared.report.kept == 1 and prepared.report.tokens == len(row["prompt_ids"])
    assert eval_prompts(_stage([{"prompt": [ASK], "answer": 4}]), tmp_path, tmp_path / "cache", 4) == [
        {"messages": [ASK], "reference": None}
    ]


def test_long_prompts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 90, "answer": "x"}, {"prompt": "a", "answer": "x"}]
    dropped = _prepare(_stage(rows, maxPromptLength=32), tokenizer, tmp_path)
    assert len(dropped.train) == 1 and dropped.report.dropped == {"too long": 1}
    with pytest.raises(UserError, match=r"maxPromptLength: 1 of 2 prompts are longer than 80 tokens.*overflow: drop"):
        _prepare(_stage(rows), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"maxPromptLength: got 90 and 16 tokens of an answer.*context is 96"):
        _prepare(_stage(rows, maxPromptLength=90), tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"generation.maxNewTokens: got 16 tokens of an answer.*context is 16"):
        _prepare(_stage(rows), tokenizer, tmp_path, context=16)


def test_checks_before_training(tmp_path: Path) -> None:
    mixed = _spec([{"prompt": "a"}, {"prompt": [ASK]}])
    assert "make them all the same" in str(inspect(mixed, "prompt", "stages[0].rlhf.data", tmp_path)[0])
    stage = _stage([{"prompt": "a", "anwser": 1}])
    found = column_problems(stage, "answer", "stages[0].rlhf.rewards[0].exactMatch", "stages[0].rlhf", tmp_path)
    assert "no column `answer` in stages[0].rlhf.data: did you mean `anwser`?" in str(found[0])
    assert not column_problems(stage, "anwser", "x", "stages[0].rlhf", tmp_path)
