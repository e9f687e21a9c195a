"""The quickstart's data is reproducible and valid, and its evaluation questions are not in its training data."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "quickstart_data.py"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def tables(module: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return dict(module.build())


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([sys.executable, SCRIPT, tmp_path / name], check=True, capture_output=True)
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written == [".gitignore", "corpus.jsonl", "held-out.jsonl", "preferences.jsonl", "questions.jsonl"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in written)


def test_without_docstrings_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-OO", SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run it without -OO" in done.stderr


def test_files_hold_the_rows(module: ModuleType, tables: dict[str, list[Any]], tmp_path: Path) -> None:
    counts = module.write(tmp_path)
    for name, rows in tables.items():
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == rows
        assert counts[name] == len(rows) > 100


def test_the_corpus_has_no_text_twice(tables: dict[str, list[Any]]) -> None:
    texts = [row["text"] for row in tables["corpus.jsonl"]]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)
    assert sum(map(len, texts)) > 500_000


def test_held_out_questions_are_not_trained_on(tables: dict[str, list[Any]]) -> None:
    trained, held_out = _dialogues(tables["questions.jsonl"]), _dialogues(tables["held-out.jsonl"])
    assert len(set(trained)) == len(trained) > 500
    assert len(set(held_out)) == len(held_out) > 100
    assert not {question for question, _ in trained} & {question for question, _ in held_out}
    assert {answer for _, answer in trained} == {answer for _, answer in held_out}


def test_a_question_has_one_answer(tables: dict[str, list[Any]]) -> None:
    pairs = _dialogues(tables["questions.jsonl"]) + _dialogues(tables["held-out.jsonl"])
    assert len(dict(pairs)) == len(pairs)


def test_known_functions_have_their_sentences(module: ModuleType) -> None:
    answers = module.question_answers()
    assert answers["len"] == "Return the number of items in a container."
    assert answers["list.pop"] == "Remove and return item at index (default last)."
    assert all(answer.endswith(".") and "  " not in answer for answer in answers.values())


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("f(x) -> y\n\nGive y. And more.", "Give y."),
        ("Break\nlines   here.\n\nRest.", "Break lines here."),
        ("No full stop", ""),
        ("Make a file (e.g.\nzip) of it.", ""),
        ("f(x)", ""),
    ],
)
def test_first_sentence(module: ModuleType, doc: str, sentence: str) -> None:
    assert module.first_sentence(doc) == sentence


def test_preferences_differ_and_are_the_right_way_round(tables: dict[str, list[Any]]) -> None:
    answers = dict(_dialogues(tables["questions.jsonl"]))
    for row in tables["preferences.jsonl"]:
        [question], [chosen], [rejected] = row["prompt"], row["chosen"], row["rejected"]
        assert chosen["content"] == answers[question["content"]] != rejected["content"]


def test_the_job_is_valid_and_reads_what_is_written(tables: dict[str, list[Any]]) -> None:
    document = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
    job = FineTuneJob.model_validate(document)
    assert [stage.kind for stage in job.spec.stages] == ["tokenizer", "pretrain", "sft", "dpo"]
    specs = [stage.spec for stage in job.spec.stages]
    data = [spec.data for spec in specs] + [spec.eval_data for spec in specs if getattr(spec, "eval_data", None)]
    read = {source.file for each in data for source in each.sources}
    assert read == {f"quickstart-data/{name}" for name in tables}


def _dialogues(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
