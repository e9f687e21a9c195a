"""Preparation of the real datasets; their text is never printed."""

from __future__ import annotations

from pathlib import Path

from support.data.data_cases import dpo, made, pretrain, sft, trained_text
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data import inspect

Tok = PreTrainedTokenizerFast


def test_transcripts(shared: Path, tokenizer: Tok, tmp_path: Path) -> None:
    data = {"sources": [{"file": str(shared / "hh-harmless-test.jsonl.gz")}], "transcript": {}, "limit": 300}
    stage = dpo(data, maxLength=2048)
    assert not inspect(stage.data, "preference", "d", tmp_path)
    done = made(stage, tokenizer, tmp_path)
    assert done.report.kept > 280
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in done.train:
        masked = [token for token, mask in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if mask]
        assert bool(masked) and tokenizer.convert_tokens_to_ids("<|im_start|>") not in masked
        assert end in masked or len(row["prompt_ids"]) + len(row["chosen_ids"]) == 2048


def test_join_and_template(shared: Path, tokenizer: Tok, tmp_path: Path) -> None:
    join = {"file": str(shared / "text2cypher_schemas.csv"), "key": "database"}
    template = {"system": "{schema}", "prompt": "{question}", "completion": "{cypher}"}
    source = {"file": str(shared / "text2cypher.csv"), "join": join}
    stage = sft({"sources": [source], "template": template, "limit": 50, "shuffle": False}, maxLength=16384)
    assert not inspect(stage.data, "sft", "d", tmp_path)
    done = made(stage, tokenizer, tmp_path, context=None)
    first = done.train[0]
    text = tokenizer.decode(first["input_ids"])
    assert "Node properties:" in text and "What are the top 5 movies" in text
    trained = trained_text(tokenizer, first)
    assert trained.startswith("MATCH (m:Movie)\n") and trained.endswith("LIMIT 5<|im_end|>")


def test_text_file_is_reproduced_by_its_tokens(shared: Path, tokenizer: Tok, tmp_path: Path) -> None:
    path = shared / "tinyshakespeare.txt"
    data = {"sources": [{"file": str(path)}], "shuffle": False}
    done = made(pretrain(data, blockSize=8), tokenizer, tmp_path)
    tokens = [token for row in done.train for token in row["input_ids"] if token != tokenizer.eos_token_id]
    text = tokenizer.decode(tokens).encode()
    assert path.read_bytes().startswith(text[:-8]) and len(text) > path.stat().st_size - 64
