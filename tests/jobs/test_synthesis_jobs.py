"""Whole synthesis jobs: with a server that fails at random, killed and resumed, and the result trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import running
from support.jobs.synthesis_jobs import DOCUMENTS, SCRIPT, account, brain, end_whole_tree, files, journaled, rows, stage
from support.synthesis.faulty_teacher import KEY, FaultyTeacher

from finetune_trainer.progress.formatting import percent

Job = dict[str, Any]
Write = Callable[[Job], Path]


@pytest.fixture
def questions_job(base_job: Job, tmp_path: Path) -> Job:
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    base_job["spec"]["stages"] = []
    return base_job


@pytest.mark.timeout(900)  # two runs, each of which starts Ray
def test_made_through_faults_and_kills_and_trained_on(
    questions_job: Job, write_job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    job = questions_job
    with FaultyTeacher(brain(), faults=0.4, seed=7, stall=60, delay=0.05) as server:
        method = {"questions": {"grounding": "judge"}, "data": {"sources": [{"file": "documents.jsonl"}]}}
        training = {"data": {"sources": [{"stage": "synthesize"}]}, "maxLength": 64, "maxSteps": 2}
        job["spec"]["stages"] = [stage(server, method, apiKeyEnv="TEACHER_KEY"), {"sft": training}]
        job["spec"]["resources"] = {"workersPerNode": 2}
        path = write_job(job)
        server.hold_after = 30
        process = running.start(path)
        assert server.held.wait(240), "the server has answered 30 requests and holds the next"
        _wait_for(lambda: journaled(job) >= 30)
        end_whole_tree(process)
        server.until_left()
        assert server.charged == journaled(job) == 30
        server.hold_after = None
        rest = running.run(path, "--resume")
        assert rest[0] == 0, rest[1]
        assert "30 answers are there from before" in rest[1]
        assert KEY not in rest[1] and not any(KEY in part.read_text() for part in files(job).rglob("*.json*"))
        assert server.charged == journaled(job) and not server.charged_twice, "no call is paid for twice"
        told = account(job)
    made = rows(job)
    assert told["items"] == len(DOCUMENTS) and told["rows"] == len(made)
    assert told["rows"] + sum(told["rejected"].values()) == told["outcomes"]
    assert told["cost"]["answers"] == server.charged and told["cost"]["price"] > 0
    prompts = [row["messages"][0]["content"] for row in made]
    assert len(set(prompts)) == len(prompts) and len(prompts) > len(DOCUMENTS), "complete, and nothing doubled"
    sources = {row["provenance"]["source"] for row in made}
    assert sources == set(range(len(DOCUMENTS))), "no document is lost"
    report = (files(job).parents[1] / "report.html").read_text()
    assert "Rows made" in report and percent(told["yield"]) in report and KEY not in report
    assert len(running.losses(files(job).parent / "01-sft")) == 2, "and trained on"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_local_model_teaches_alike_with_any_number_of_workers(questions_job: Job, write_job: Write) -> None:
    """A tiny model generates no useful rows, so the test compares the counts of requests, answers and rejections."""
    accounts = []
    for workers in (1, 2):
        method = {
            "evolve": {"numEvolutions": 1, "includeSeeds": True},
            "data": {"sources": [{"inline": [{"prompt": f"{n} plus {n}"} for n in range(6)]}]},
            "maxAttempts": 1,
            "teacher": {"model": {}, "generation": {"maxNewTokens": 6, "doSample": True}},
        }
        questions_job["metadata"]["name"] = f"workers-{workers}"
        questions_job["spec"]["resources"] = {"workersPerNode": workers}
        questions_job["spec"]["stages"] = [{"synthesize": method}]
        running.run(write_job(questions_job))
        accounts.append(account(questions_job))
    assert accounts[0] == accounts[1] and accounts[0]["outcomes"] == 12


FAULTS = [
    ({"text2sql": {"database": {"sql": "CREATE TABEL x"}}}, {}, "text2sql.database.sql"),
    ({"text2sql": {"database": {"script": "none.sql"}}}, {}, "none.sql"),
    ({"text2cypher": {"database": {"cypher": "CREATE NODE TABEL x"}}}, {}, "text2cypher.database.cypher"),
    (
        {"text2sql": {"database": {"sql": "CREATE TABLE x (y)"}}},
        {"apiKeyEnv": "NOT_SET"},
        "the environment variable NOT_SET, which must hold the API key, is not set",
    ),
    ({"text2sql": {"database": {"sql": "CREATE TABLE x (y)"}}}, {"model": "techer"}, "did you mean `teacher`"),
    ({"questions": {}, "data": {"sources": [{"inline": [{"txt": "a"}]}]}}, {}, "no column `text`"),
    (
        {"text2sql": {"database": {"sql": "CREATE TABLE x (y)"}}, "decontaminate": {"sources": [{"file": "no.csv"}]}},
        {},
        "no.csv",
    ),
]


def test_faults_are_told_before_anything_is_asked(base_job: Job, write_job: Write) -> None:
    with FaultyTeacher(brain()) as server:
        stages = [stage(server, method, **endpoint) for method, endpoint, _ in FAULTS]
        gone = stage(server, FAULTS[3][0], baseUrl="http://127.0.0.1:9/v1")
        base_job["spec"]["stages"] = [{"name": f"s{number}", **one} for number, one in enumerate([*stages, gone])]
        code, output = running.run(write_job(base_job))
    assert code == 2, output
    for _, _, words in FAULTS:
        assert words in output, output
    assert "127.0.0.1:9/v1 can't be reached" in output
    assert not server.charged


def test_the_plan_bounds_the_cost(base_job: Job, write_job: Write) -> None:
    with FaultyTeacher(brain()) as server:
        spec = {"text2sql": {"database": {"sql": SCRIPT}, "numPairs": 30, "pairsPerRequest": 5}}
        base_job["spec"]["stages"] = [stage(server, spec)]
        path = write_job(base_job)
        command = [sys.executable, "-c", "from finetune_cli.main import main; main()", "plan", str(path), "--json"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"})
        assert out.returncode == 0, out.stderr
        planned = json.loads(out.stdout)["syntheses"][0]
        assert running.run(path)[0] == 0
    told = account(base_job)
    assert planned["calls"] == 6 and planned["rows"] == 30
    again = told["cost"]["answers"] - planned["calls"]
    assert 0 <= again < 6, "calls beyond the plan are those asked again"
    assert planned["price"] > told["cost"]["price"] * planned["calls"] / told["cost"]["answers"] > 0


def _wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
