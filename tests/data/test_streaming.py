"""A stream yields the rows of the prepared data, divided among ranks, and resumes at exactly the next row."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.data.data_cases import made, pretrain, sft, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_api.stages import PretrainSpec, SftSpec
from finetune_trainer.data import StreamedRows, streaming
from finetune_trainer.errors import UserError

Tok = PreTrainedTokenizerFast
ROWS = [{"text": f"document {number} " * (number % 17 + 1)} for number in range(150)]


def _stage(kind: str, path: Path, **more: Any) -> PretrainSpec | SftSpec:
    data = {"sources": [{"file": str(path)}], "streaming": True, **more}
    if kind == "text":
        return pretrain(data, blockSize=32, maxSteps=1)
    packing = {"packing": True, "maxLength": 128} if kind == "packed" else {"maxLength": 64}
    return sft(data, maxSteps=1, overflow="split", **packing)


def _stream(kind: str, tokenizer: Tok, tmp_path: Path, **more: Any) -> StreamedRows:
    half = len(ROWS) // 2
    (tmp_path / "s").mkdir(exist_ok=True)
    write_jsonl(tmp_path / "s/1.jsonl", ROWS[:half])
    write_jsonl(tmp_path / "s/2.jsonl", ROWS[half:])
    stream = made(_stage(kind, tmp_path / "s/*.jsonl", **more), tokenizer, tmp_path).train
    assert isinstance(stream, StreamedRows)
    return stream


@pytest.mark.parametrize("kind", ["text", "sft", "packed"])
def test_resume_is_exact(kind: str, tokenizer: Tok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 40)
    stream = _stream(kind, tokenizer, tmp_path).shard(1, 2)
    rows = list(islice(stream, 300))
    for after in (0, 1, 2, 17, 40, 111, 256):
        state = json.loads(json.dumps(stream.state_at(after))) if after else stream.shard(1, 2).state_dict()
        fresh = stream.shard(1, 2)
        fresh.load_state_dict(state)
        assert list(islice(fresh, 40)) == rows[after : after + 40], f"after {after} rows"
        assert fresh.state_dict() == stream.state_at(after + 40)


def test_resuming_tokenises_only_what_is_new(tokenizer: Tok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _stream("sft", tokenizer, tmp_path)
    list(islice(stream, 100))
    fresh = stream.shard(0, 1)
    fresh.load_state_dict(stream.state_dict())
    encoded: list[int] = []
    real = streaming.Encoder.rows
    monkeypatch.setattr(
        streaming.Encoder, "rows", lambda self, rows, stats: (encoded.append(1), real(self, rows, stats))[1]
    )
    next(iter(fresh))
    assert len(encoded) <= 2


def test_ranks_divide_a_pass(tokenizer: Tok, tmp_path: Path) -> None:
    stream = _stream("sft", tokenizer, tmp_path, shuffle=False)
    whole = list(islice(stream, 400))
    first_pass = _rows_of_pass(stream.shard(0, 1))
    parts = [_rows_of_pass(stream.shard(rank, 2)) for rank in range(2)]
    assert sorted(row for part in parts for row in part) == sorted(first_pass) and all(parts)
    assert [row["input_ids"] for row in whole[: len(first_pass)]] == first_pass


def _rows_of_pass(stream: StreamedRows) -> list[list[int]]:
    rows = []
    for row in stream:
        if stream.state_dict()["epoch"]:
            return rows
        rows.append(row["input_ids"])
    return rows


def test_passes_are_shuffled_anew(tokenizer: Tok, tmp_path: Path) -> None:
    stream = _stream("sft", tokenizer, tmp_path)
    count = len(_rows_of_pass(stream.shard(0, 1)))
    rows = [tuple(row["input_ids"]) for row in islice(stream.shard(0, 1), 2 * count)]
    assert sorted(rows[:count]) == sorted(rows[count:]) and rows[:count] != rows[count:]


def test_states_of_other_ranks_are_refused(tokenizer: Tok, tmp_path: Path) -> None:
    stream = _stream("text", tokenizer, tmp_path)
    with pytest.raises(ValueError, match="rank 0 of 1"):
        stream.shard(0, 2).load_state_dict(stream.state_dict())
    with pytest.raises(KeyError, match="no state after 5 rows"):
        stream.state_at(5)


def test_bad_rows_stop_the_stream(tokenizer: Tok, tmp_path: Path) -> None:
    stream = _stream("text", tokenizer, tmp_path)
    write_jsonl(tmp_path / "s/2.jsonl", [{"txt": "a"}])
    with pytest.raises(UserError, match=r"2.jsonl, line 1: no column `text`: did you mean `txt`"):
        list(islice(stream, 1000))
