"""The evaluation section of the report: metrics with differences, the gate's verdict, answers side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_api.runconfig import RunConfig
from finetune_trainer.layout import StageLayout
from finetune_trainer.report import write_report
from finetune_trainer.report.bars import Bars
from finetune_trainer.report.collect import StageRecord
from finetune_trainer.report.evaluation_view import evaluation
from finetune_trainer.storage.filesystem import Storage

LAYOUT = StageLayout(1, "check")
HOSTILE = "<script>alert(1)</script>\x1b[2J"
GATE = [{"metric": "exactMatch", "atLeast": 0.9}, {"metric": "perplexity", "atMost": 0, "relativeTo": "base"}]
GIVEN: dict[str, Any] = {
    "model": "sft",
    "models": {
        "sft": {"perplexity": 2.5, "exactMatch": 0.5, "rougeL": 0.8},
        "base": {"perplexity": 500.0, "exactMatch": 0.0, "rougeL": 0.9},
    },
    "rows": 12,
    "cut_prompts": 3,
    "samples": [
        {
            "prompt": [{"role": "user", "content": "How many?"}],
            "reference": "SELECT 1",
            "answers": {
                "sft": {"answer": "SELECT 1", "scores": {"exactMatch": 1.0, "rougeL": 1.0}},
                "base": {"answer": HOSTILE, "scores": {"exactMatch": 0.0}, "error": "syntax error"},
            },
        }
    ],
}


def page(tmp_path: Path, gate: Any = GATE, given: Any = GIVEN) -> str:
    data = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}
    check = {"data": data, "metrics": ["perplexity", "exactMatch"], "compareWith": ["base"], "gate": gate}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {"model": {"hub": "a/b"}, "stages": [{"sft": {"data": data}}, {"name": "check", "evaluate": check}]},
    }
    run = RunConfig.model_validate({"job": job, "root": str(tmp_path), "baseDir": "/", "cacheDir": "/tmp"})
    (tmp_path / LAYOUT.root).mkdir(parents=True)
    (tmp_path / LAYOUT.evaluation).write_text(json.dumps(given))
    (tmp_path / LAYOUT.done).write_text(json.dumps({"metrics": {"perplexity": 2.5, "base.perplexity": 500.0}}))
    return Path(write_report(Storage(str(tmp_path)), [LAYOUT], run)).read_text()


def test_models_stand_side_by_side(tmp_path: Path) -> None:
    html = page(tmp_path)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.partition("<main>")[2]))
    assert "Metric sft base" in text
    assert "perplexity 2.5 500 \N{MINUS SIGN}497.5" in text
    assert 'change better">\N{MINUS SIGN}497.5' in html and 'change worse">\N{MINUS SIGN}0.1' in html
    assert "✗ not passed: exactMatch is 0.5, expected at least 0.9" in html
    assert "✓ passed: perplexity minus base" in html
    assert "The gate of check is not passed: the job ended there." in html
    assert "✓ right" in html and "✗ wrong" in html and "syntax error" in text
    assert "user How many?" in text and "Prompts cut to fit 3" in text
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html


def test_a_passed_gate_warns_of_nothing(tmp_path: Path) -> None:
    html = page(tmp_path, gate=[{"metric": "exactMatch", "atLeast": 0.5}])
    assert "✓ passed: exactMatch is 0.5" in html and "the job ended there" not in html


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": 3},
        {"model": "sft", "models": {"sft": []}, "samples": 7},
        {"model": "sft", "models": {"sft": {"a": "x"}}, "samples": [{"answers": {"sft": 1}}, None]},
        {"model": "sft", "models": {"sft": {"a": float("nan")}, "base": {"a": float("inf")}}},
    ],
)
def test_values_of_the_wrong_kind_are_survived(tmp_path: Path, given: Any) -> None:
    assert "1. check" in page(tmp_path, given=given)


def test_a_stage_of_another_kind_has_no_evaluation() -> None:
    assert evaluation(StageRecord(LAYOUT, "sft"), None) is None


def test_bars_begin_at_nothing() -> None:
    assert Bars("a", {"x": 0.5, "y": 0.25, "z": 0.0}).shares == [("x", "0.5", 100), ("y", "0.25", 50), ("z", "0.0", 0)]
    far = Bars("p", {"x": 2.0, "y": 2000.0})
    assert far.by_logarithm and [round(length) for *_, length in far.shares] == [14, 100]
