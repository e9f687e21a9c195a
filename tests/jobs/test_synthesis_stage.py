"""The synthesis stage on one worker without Ray: every method, stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import synthesis_jobs
from support.jobs.synthesis_jobs import (
    DOCUMENTS,
    GRAPH,
    SCRIPT,
    WORDS,
    account,
    brain,
    journaled,
    perform_stage,
    rows,
    stage,
)
from support.synthesis.faulty_teacher import FaultyTeacher

from finetune_trainer.queries.result import Engine
from finetune_trainer.queries.sandbox import Sandbox, make_database

Job = dict[str, Any]
QUESTIONS: Job = {"questions": {"grounding": "judge"}, "data": {"sources": [{"file": "documents.jsonl"}]}}
SEEDS = [{"prompt": f"Name {number} {word}."} for number in range(3) for word in WORDS]
EVOLVE: Job = {"evolve": {"numEvolutions": 2}, "data": {"sources": [{"inline": SEEDS}]}}


@pytest.fixture
def job(base_job: Job, tmp_path: Path) -> Job:
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return base_job


def test_rows_are_the_same_whatever_goes_wrong(job: Job, tmp_path: Path) -> None:
    made = []
    for faults, concurrency in ((0.4, 8), (0.0, 1)):
        job["metadata"]["name"] = f"at-{concurrency}"
        with FaultyTeacher(brain(), faults=faults, seed=5, stall=60) as server:
            job["spec"]["stages"] = [stage(server, QUESTIONS, concurrency=concurrency)]
            metrics = perform_stage(job, tmp_path)
            assert metrics is not None and metrics["calls"] == server.charged and not server.charged_twice
        told = account(job)
        assert told["items"] == len(DOCUMENTS) and told["rows"] == len(rows(job))
        assert told["rows"] + sum(told["rejected"].values()) == told["outcomes"]
        made.append((rows(job), told))
    assert made[0] == made[1]
    found, _ = made[0]
    prompts = [row["messages"][0]["content"] for row in found]
    assert len(set(prompts)) == len(prompts) and len(prompts) > len(DOCUMENTS), "complete, and nothing doubled"
    assert {row["provenance"]["source"] for row in found} == set(range(len(DOCUMENTS))), "no document is lost"


def test_a_killed_stage_goes_on_and_pays_for_nothing_twice(job: Job, tmp_path: Path) -> None:
    """The process is killed three times, each time while it waits for answers that the server delays."""
    with FaultyTeacher(brain(), faults=0.3, seed=2, stall=60, delay=0.02) as server:
        job["spec"]["stages"] = [stage(server, QUESTIONS)]
        (tmp_path / "job.json").write_text(json.dumps(job))
        for answered in (10, 25, 40):
            server.held.clear()
            server.hold_after = answered
            command = [sys.executable, synthesis_jobs.__file__, str(tmp_path / "job.json"), str(tmp_path)]
            process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
            assert server.held.wait(120), "the server has answered so many and holds the next"
            _wait_for(lambda answered=answered: journaled(job) >= answered)
            process.kill()
            process.wait()
            server.until_left()
            assert server.charged == journaled(job) == answered
        server.hold_after = None
        assert perform_stage(job, tmp_path) is not None
        assert server.charged == journaled(job) and not server.charged_twice
        assert account(job)["cost"]["answers"] == server.charged
    with FaultyTeacher(brain()) as server:
        whole = rows(job)
        job["metadata"]["name"] = "undisturbed"
        job["spec"]["stages"] = [stage(server, QUESTIONS)]
        perform_stage(job, tmp_path)
    assert rows(job) == whole


def test_a_stop_keeps_what_is_paid(job: Job, tmp_path: Path) -> None:
    stop = threading.Event()
    with FaultyTeacher(brain(), delay=0.2) as server:
        job["spec"]["stages"] = [stage(server, EVOLVE, concurrency=4)]
        watch = threading.Thread(target=lambda: (_wait_for(lambda: server.charged >= 8), stop.set()))
        watch.start()
        assert perform_stage(job, tmp_path, stop) is None
        watch.join()
        assert 8 <= server.charged == journaled(job), "answers under way are waited for"
        assert perform_stage(job, tmp_path) is not None
        assert not server.charged_twice and server.charged == journaled(job)
    told = account(job)
    assert told["items"] == len(SEEDS) and set(told["by"]) <= {
        *("constraints", "deepening", "concretizing", "reasoning", "complicateInput", "breadth")
    }


@pytest.mark.parametrize(
    ("method", "engine", "script"), [("text2sql", "sqlite", SCRIPT), ("text2cypher", "cypher", GRAPH)]
)
def test_every_pair_runs_and_the_rest_is_accounted_for(
    method: str, engine: Engine, script: str, job: Job, tmp_path: Path
) -> None:
    (tmp_path / "script").write_text(script)
    with FaultyTeacher(brain(), faults=0.2, seed=1, stall=60) as server:
        spec = {method: {"database": {"script": "script"}, "numPairs": 30, "requireRows": True}}
        job["spec"]["stages"] = [stage(server, spec)]
        perform_stage(job, tmp_path)
    make_database(engine, tmp_path / "again", script)
    with Sandbox(engine, tmp_path / "again") as sandbox:
        for row in rows(job):
            assert sandbox.run(row["messages"][-1]["content"]).rows
    told = account(job)
    assert told["rejected"]["query does not execute"] >= 2 and told["rows"] >= 10


def test_evaluation_data_is_kept_out(job: Job, tmp_path: Path) -> None:
    taken = "People of land 2 name glaciers after birds and after old kings."
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": taken}]}))
    with FaultyTeacher(brain()) as server:
        made = QUESTIONS | {"decontaminate": {"sources": [{"file": "test.jsonl"}], "ngram": 8}}
        job["spec"]["stages"] = [stage(server, made)]
        perform_stage(job, tmp_path)
    told = account(job)
    assert told["rejected"]["shares text with evaluation data"] >= 1
    assert not any("land 2 name glaciers" in row["messages"][1]["content"] for row in rows(job))


def test_a_local_model_teaches_and_resumes(job: Job, tmp_path: Path) -> None:
    """A tiny model generates no useful rows, so the test checks requests, answers and rejections."""
    seeds = [{"prompt": f"{number} plus {number}"} for number in range(6)]
    method = {
        "evolve": {"numEvolutions": 1, "includeSeeds": True},
        "data": {"sources": [{"inline": seeds}]},
        "maxAttempts": 1,
        "teacher": {"model": {"perDeviceBatchSize": 4}, "generation": {"maxNewTokens": 6, "doSample": True}},
    }
    job["spec"]["stages"] = [{"synthesize": method}]
    accounts = []
    for _ in range(2):
        try:
            perform_stage(job, tmp_path)
        except Exception as error:
            assert "no row could be made" in str(error)
        accounts.append((account(job), journaled(job)))
    assert accounts[0] == accounts[1] and accounts[0][0]["outcomes"] == 12 and accounts[0][1] >= 6


def _wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
