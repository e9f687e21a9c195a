"""The data cache: hits, misses on changed content, equal bytes for any number of processes, one build at a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from support.data.data_cases import inline, made, pretrain, sft, write_jsonl
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data import DataReport, corpus_texts, eval_prompts, tokenization
from finetune_trainer.errors import UserError

Tok = PreTrainedTokenizerFast
ROWS = [{"text": f"document {number} " * 20} for number in range(400)]


def _contents(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(cache.glob("prepared/*/*/*.arrow"))]


def test_hit_and_miss(tokenizer: Tok, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    stage = sft({"sources": [{"file": "x.jsonl"}]})
    first, again = (made(stage, tokenizer, tmp_path) for _ in range(2))
    assert (first.report.cached, again.report.cached) == (False, True)
    assert first.train[:] == again.train[:]
    assert DataReport.from_json(again.report.to_json()) == again.report
    write_jsonl(path, [*ROWS, {"text": "one more"}])
    changed = made(stage, tokenizer, tmp_path)
    assert (changed.report.cached, changed.report.rows) == (False, 401)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert not made(stage, other, tmp_path).report.cached


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_bytes_do_not_depend_on_processes(
    kind: str, tokenizer: Tok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "ROW_TASK", 16 << 10)
    monkeypatch.setattr(tokenization, "TEXT_TASK", 16 << 10)
    data = {"sources": [{"file": str(write_jsonl(tmp_path / "x.jsonl", ROWS))}], "validationSplit": 0.1}
    stage = pretrain(data, blockSize=32) if kind == "text" else sft(data, maxLength=128, packing=True)
    made(stage, tokenizer, tmp_path / "one", num_proc=1)
    made(stage, tokenizer, tmp_path / "three", num_proc=3)
    one, three = _contents(tmp_path / "one/cache"), _contents(tmp_path / "three/cache")
    assert one == three and len(one) >= 2


def _race(stage: object, tokenizer: Tok, tmp_path: Path, results: object) -> None:
    results.put(made(stage, tokenizer, tmp_path).report.cached)  # type: ignore[arg-type, attr-defined]


def test_two_processes_build_once(tokenizer: Tok, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    stage = pretrain({"sources": [{"file": "x.jsonl"}]}, blockSize=64)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_race, args=(stage, tokenizer, tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    cached = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert cached == [False, True]
    assert len([path for path in (tmp_path / "cache/prepared").iterdir() if path.is_dir()]) == 1


def test_split_limit_and_shuffle(tokenizer: Tok, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)

    def texts(**more: object) -> tuple[list[str], list[str]]:
        done = made(sft({"sources": [{"file": str(path)}], **more}), tokenizer, tmp_path)
        parts = [[tokenizer.decode(row["input_ids"]) for row in part] for part in (done.train, done.eval or [])]
        return parts[0], parts[1]

    train, held = texts(validationSplit=0.1, limit=100)
    assert (len(train), len(held)) == (90, 10) and not set(train) & set(held)
    assert texts(validationSplit=0.1, limit=100, seed=7)[1] != held
    assert texts(shuffle=False, limit=3)[0] == [row["text"] + "<|endoftext|>" for row in ROWS[:3]]
    with pytest.raises(UserError, match="there is 1 row"):
        texts(limit=1, validationSplit=0.5)


def test_corpus_and_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    stage = pretrain({"sources": [{"file": str(path)}], "validationSplit": 0.1})
    train, held, size = corpus_texts(stage.data, "stages[0].tokenizer.data", tmp_path, tmp_path / "cache")
    assert sorted([*train, *held]) == sorted(row["text"] for row in ROWS)
    assert size >= sum(len(row["text"]) for row in ROWS)
    torn = pretrain({"sources": [{"file": str(write_jsonl(tmp_path / "y.jsonl", [{"text": "a"}, {"words": "b"}]))}]})
    with pytest.raises(UserError, match=r"stages\[0\]\.tokenizer\.data"):
        corpus_texts(torn.data, "stages[0].tokenizer.data", tmp_path, tmp_path / "cache")
    prompts = eval_prompts(stage, tmp_path, tmp_path / "cache", 3)
    assert len(prompts) == 3 and {prompt["prompt"] + prompt["reference"] for prompt in prompts} <= {
        row["text"] for row in ROWS
    }
    talk = sft(inline([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]))
    assert eval_prompts(talk, tmp_path, tmp_path / "cache", 1) == [
        {"messages": [{"role": "user", "content": "a"}], "reference": "b"}
    ]
