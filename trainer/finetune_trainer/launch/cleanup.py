"""Empties a deleted job's directory in storage."""

from __future__ import annotations

from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.drive import report_outcome
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.storage.filesystem import Storage


def run_cleanup(config: Path) -> ExitCode:
    """Delete all that the job has stored; a directory that holds no run of ours is left alone."""
    run = RunConfig.model_validate_json(config.read_text())
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return report_outcome(reporter, lambda: _empty(run))


def _empty(run: RunConfig) -> None:
    storage = Storage(run.root)
    if storage.exists(RUN_CONFIG):
        storage.delete("")
        print(f"deleted {run.root}", flush=True)
