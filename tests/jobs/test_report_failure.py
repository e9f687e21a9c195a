"""A stage that fails where not even its report can be written: why it failed is what is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_trainer.layout import REPORT, RUN_CONFIG

PROGRAM = """
import sys, threading
from pathlib import Path
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.pipeline import Pipeline
from finetune_trainer.progress.plain_reporter import PlainReporter
run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
Pipeline(run, PlainReporter(sys.stdout), threading.Event()).execute(resume=True, checked=True)
"""


def test_a_report_that_cannot_be_written_hides_no_failure(tmp_path: Path) -> None:
    data = {"sources": [{"file": str(tmp_path / "gone.jsonl")}]}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"config": {"model_type": "llama"}}, "stages": [{"tokenizer": {"data": data}}]},
    }
    root, file = tmp_path / "run", tmp_path / "run.json"
    run = RunConfig.model_validate({"job": job, "root": str(root), "baseDir": "/", "cacheDir": str(tmp_path / "cache")})
    file.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    (root / REPORT / "in the way").mkdir(parents=True)
    (root / RUN_CONFIG).write_text(file.read_text())
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, timeout=300)
    assert "no report: " in done.stdout, done.stderr
    assert "gone.jsonl: no such file" in done.stderr.splitlines()[-1], done.stderr
