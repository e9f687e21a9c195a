"""Deletes the directory of a deleted job in storage."""

from __future__ import annotations

from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.drive import report_outcome
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.storage.filesystem import Storage


def run_cleanup(config: Path) -> ExitCode:
    """Delete the job's directory in storage, unless it does not contain a run."""
    run = RunConfig.model_validate_json(config.read_text())
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return report_outcome(reporter, lambda: _delete(run))


def _delete(run: RunConfig) -> None:
    storage = Storage(run.root)
    if storage.exists(RUN_CONFIG):
        storage.delete("")
        print(f"deleted {run.root}", flush=True)
