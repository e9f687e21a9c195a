"""Jobs with evaluation stages from the command line: metrics, comparisons, gates, interruption and resuming."""

from __future__ import annotations

import html
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs.running import done, run, start

pytestmark = pytest.mark.timeout(900)
Job = dict[str, Any]
Write = Callable[[Job], Path]
SCHEMA = "CREATE TABLE t (a INTEGER, b INTEGER); " + "".join(f"INSERT INTO t VALUES ({a}, {a + a});" for a in range(8))
ROWS = [
    {"prompt": [{"role": "user", "content": f"b of {a}"}],
     "completion": [{"role": "assistant", "content": f"SELECT b FROM t WHERE a={a}"}]}
    for a in range(8)
]  # fmt: skip


@pytest.fixture
def gated_job(base_job: Job, tmp_path: Path) -> Job:
    """Return a job: SFT that memorises eight queries, an evaluation before and after with a gate, and another stage."""
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = {"sources": [{"file": "queries.jsonl"}]}
    sft = {"data": data, "maxSteps": 120, "learningRate": 0.006, "lrSchedulerType": "constant", "saveSteps": 1000}
    evaluate = {
        "data": data,
        "metrics": ["perplexity", "exactMatch", "rougeL", "bleu", "chrf", "executionAccuracy"],
        "compareWith": ["base"],
        "generation": {"maxNewTokens": 34},
        "database": {"sql": SCHEMA},
        "perDeviceEvalBatchSize": 3,
        "gate": [
            {"metric": "exactMatch", "atLeast": 0.9},
            {"metric": "perplexity", "atMost": -1, "relativeTo": "base"},
        ],
    }
    base_job["spec"]["stages"] = [
        {"sft": sft},
        {"evaluate": evaluate},
        {"name": "more", "sft": {**sft, "maxSteps": 1}},
    ]
    return base_job


def _evaluation(job: Job) -> Path:
    return Path(job["spec"]["storage"]["path"], "job/stages/01-evaluate")


def test_a_model_that_learnt_its_task_passes(gated_job: Job, write_job: Write) -> None:
    code, output = run(write_job(gated_job))
    assert code == 0, output
    stage = _evaluation(gated_job)
    metrics = done(stage)["metrics"]
    print(metrics)
    assert metrics["exactMatch"] == metrics["executionAccuracy"] == metrics["rougeL"] == 1
    assert metrics["bleu"] == pytest.approx(100) and metrics["chrf"] == pytest.approx(100)
    assert metrics["base.exactMatch"] == metrics["base.executionAccuracy"] == 0
    assert metrics["perplexity"] < 1.1 < 50 < metrics["base.perplexity"]
    assert (stage.parent / "02-more/done.json").is_file()
    answers = [json.loads(line) for line in (stage / "answers/sft.jsonl").read_text().splitlines()]
    assert [row["row"] for row in answers] == list(range(8))
    assert {row["answer"] for row in answers} == {row["completion"][0]["content"] for row in ROWS}
    assert not list((stage / "answers").glob("*.parts/*"))
    report = (stage.parents[1] / "report.html").read_text()
    untrained = [json.loads(line)["error"] for line in (stage / "answers/base.jsonl").read_text().splitlines()]
    assert "✓ passed: exactMatch is 1" in report and html.escape(untrained[0]) in report


def test_a_model_that_missed_its_gate_stops_the_job(gated_job: Job, write_job: Write) -> None:
    """A missed gate ends the job; with a lower bound it resumes without another evaluation."""
    gated_job["spec"]["stages"][0]["sft"]["maxSteps"] = 1
    code, output = run(write_job(gated_job))
    assert code == 4, output
    words = r"stages\[1\]\.evaluate\.gate\[0\]: exactMatch is 0, expected at least 0\.9 \(sft\)"
    assert re.search(words, output) and "gate is not passed" in output
    stage = _evaluation(gated_job)
    assert done(stage)["metrics"]["exactMatch"] == 0
    assert not (stage.parent / "02-more").exists()
    assert "at least 0.9" in (stage.parents[1] / "report.html").read_text()

    written = (stage / "answers/sft.jsonl").stat().st_mtime_ns
    code, output = run(write_job(gated_job), "--resume")
    assert code == 4 and re.search(words, output), output
    gated_job["spec"]["stages"][1]["evaluate"]["gate"] = [{"metric": "exactMatch", "atLeast": 0}]
    code, output = run(write_job(gated_job), "--resume")
    assert code == 0, output
    assert (stage / "answers/sft.jsonl").stat().st_mtime_ns == written
    assert (stage.parent / "02-more/done.json").is_file()


def test_two_workers_measure_what_one_does(gated_job: Job, write_job: Write) -> None:
    """The metrics are equal to the last bit, because the batches are the same for any number of workers."""
    stages = gated_job["spec"]["stages"]
    stages[0] = stages.pop(1)
    del stages[1]
    stages[0]["evaluate"] |= {"compareWith": [], "gate": []}
    found = []
    for workers in (1, 2):
        gated_job["metadata"]["name"] = f"job{workers}"
        gated_job["spec"]["resources"] = {"workersPerNode": workers}
        code, output = run(write_job(gated_job))
        assert code == 0, output
        stage = Path(gated_job["spec"]["storage"]["path"], f"job{workers}/stages/00-evaluate")
        found.append((done(stage)["metrics"], (stage / "answers/base.jsonl").read_text()))
    assert found[0] == found[1]


def test_a_stopped_evaluation_goes_on_where_it_stood(gated_job: Job, write_job: Write) -> None:
    """After SIGTERM between two batches, the rows measured so far are not measured again."""
    stages = gated_job["spec"]["stages"]
    stages[0] = stages.pop(1)
    del stages[1]
    slow = {"sql": SCHEMA, "timeoutSeconds": 3}
    stages[0]["evaluate"] |= {"compareWith": [], "gate": [], "database": slow, "perDeviceEvalBatchSize": 1}
    path = write_job(gated_job)
    parts = Path(gated_job["spec"]["storage"]["path"], "job/stages/00-evaluate/answers/base.parts")
    process = start(path)
    end = time.monotonic() + 200
    while not list(parts.glob("*.jsonl")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.jsonl")}
    assert 0 < len(kept) < len(ROWS)
    code, output = run(path, "--resume")
    assert code == 0, output
    assert len((parts.parent / "base.jsonl").read_text().splitlines()) == len(ROWS)
    assert yaml.safe_load(path.read_text()) == gated_job


def test_tasks_of_the_harness(base_job: Job, write_job: Write, tmp_path: Path) -> None:
    """On a custom task file, a model that knows the answers picks them and its base guesses."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: uv sync --extra lm-eval")
    facts = [{"prompt": f"b of {a} is", "completion": f" {a * 7 % 8} times {a}"} for a in range(8)]
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps({**row, "right": a}) for a, row in enumerate(facts)))
    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "facts.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": [row["completion"] for row in facts],
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/facts.yaml").write_text(yaml.safe_dump(task))
    sft = {"data": {"sources": [{"inline": facts}]}, "maxSteps": 120, "learningRate": 0.006, "saveSteps": 1000}
    gate = [{"metric": "facts.acc", "atLeast": 0.9}]
    evaluate = {"tasks": ["facts"], "includePath": "tasks", "compareWith": ["base"], "gate": gate}
    base_job["spec"]["stages"] = [{"sft": sft}, {"evaluate": evaluate}]
    code, output = run(write_job(base_job))
    assert code == 0, output
    metrics = done(_evaluation(base_job))["metrics"]
    assert metrics["facts.acc"] == 1 > 0.5 > metrics["base.facts.acc"]
