"""If a stage fails and its report cannot be written either, the error is the reason of the stage's failure."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.failures import Failure, Kind
from finetune_trainer.launch.pipeline import Pipeline
from finetune_trainer.launch.stall_diagnosis import Stalled
from finetune_trainer.layout import REPORT, RUN_CONFIG
from finetune_trainer.progress.plain_reporter import PlainReporter

PROGRAM = """
import sys, threading
from pathlib import Path
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.pipeline import Pipeline
from finetune_trainer.progress.plain_reporter import PlainReporter
run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
Pipeline(run, PlainReporter(sys.stdout), threading.Event()).execute(resume=True, checked=True)
"""


def _run(directory: Path) -> RunConfig:
    """Return a job whose only data file does not exist."""
    data = {"sources": [{"file": str(directory / "gone.jsonl")}]}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"config": {"model_type": "llama"}}, "stages": [{"tokenizer": {"data": data}}]},
    }
    places = {"root": str(directory / "run"), "baseDir": "/", "cacheDir": str(directory / "cache")}
    return RunConfig.model_validate({"job": job, **places})


def test_a_report_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    run, root, file = _run(tmp_path), tmp_path / "run", tmp_path / "run.json"
    file.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    (root / REPORT / "in the way").mkdir(parents=True)
    (root / RUN_CONFIG).write_text(file.read_text())
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, timeout=300)
    assert "no report: " in done.stdout, done.stderr
    assert "gone.jsonl: no such file" in done.stderr.splitlines()[-1], done.stderr


def test_a_driver_whose_workers_stalled_ends_without_another_look_into_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging store is one cause of stalls, and would block the driver too (observed in pods)."""
    pipeline = Pipeline(_run(tmp_path), PlainReporter(sys.stdout), threading.Event())
    failure = Failure(Kind.STALLED, Stalled("x"), "x", elsewhere=True)
    monkeypatch.setattr(pipeline, "_train_with_retries", lambda offers: failure)
    monkeypatch.setattr(pipeline, "_stages", lambda *_, **__: pytest.fail("it looks into storage"))
    assert pipeline._train_stages() is failure
