"""Short helpers to write stages and data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune_api.stages import DpoSpec, PretrainSpec, SftSpec
from finetune_trainer.data import Prepared, prepare

Rows = list[dict[str, Any]]


def inline(rows: Rows, **more: Any) -> dict[str, Any]:
    return {"sources": [{"inline": rows}], "shuffle": False, **more}


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(
    stage: PretrainSpec | SftSpec | DpoSpec,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    context: int | None = 4096,
    num_proc: int = 1,
) -> Prepared:
    return prepare(stage, tokenizer, context, "stages[0].x", tmp_path / "cache", tmp_path, num_proc)


def sft(data: dict[str, Any], **more: Any) -> SftSpec:
    return SftSpec.model_validate({"data": data, **more})


def pretrain(data: dict[str, Any], **more: Any) -> PretrainSpec:
    return PretrainSpec.model_validate({"data": data, **more})


def dpo(data: dict[str, Any], **more: Any) -> DpoSpec:
    return DpoSpec.model_validate({"data": data, **more})


def trained_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> str:
    """Return the text of the tokens that have a loss."""
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def turns(*contents: str) -> list[dict[str, str]]:
    """Return a conversation that starts with the user."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
