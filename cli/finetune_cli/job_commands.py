"""The commands for job files: `run`, `validate`, `plan` and `init`."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_api.exit_codes import ExitCode
from finetune_api.runconfig import RunConfig
from finetune_cli.outcome import guarded
from finetune_cli.starter import init_command
from finetune_trainer.errors import UserError

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The file of the job. `finetune init` creates one.")]
Assignments = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field, such as `stages[0].sft.learningRate=1e-4`. Can be repeated.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("run")(run_command)
    app.command("validate")(validate_command)
    app.command("plan")(plan_command)
    app.command("init")(init_command)


def run_command(
    job: JobFile,
    assignments: Assignments = [],  # noqa: B006  # typer's form
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint of an earlier run.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Rename the directory of an earlier run and start over.")
    ] = False,
) -> None:
    """Run all stages of a job on this machine.

    Results, metrics, checkpoints and `report.html` are written to `<storage>/<name of the job>`. Exit codes: 0 success,
    1 failure (a retry may help), 2 the job or its data is invalid, 3 out of memory, 4 an evaluation did not pass its
    gate, 75 stopped with a checkpoint (continue with `--resume`).
    """
    if resume and fresh:
        raise typer.BadParameter("--resume and --fresh are mutually exclusive")
    guarded(lambda: _run(_config(job, assignments), resume, fresh))


def validate_command(
    job: JobFile,
    assignments: Assignments = [],  # noqa: B006
    offline: Annotated[bool, typer.Option("--schema-only", help="Check only the fields, not models and data.")] = False,
) -> None:
    """Check the fields, the model and the data of a job without training.

    All problems are reported at once, with exit code 2.
    """
    guarded(lambda: _validate(_config(job, assignments), offline))


def plan_command(
    job: JobFile,
    assignments: Assignments = [],  # noqa: B006
    device: Annotated[
        str | None,
        typer.Option(help="Device to plan for, such as `H100` or `80Gi`. Default: the device of this machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show the requirements of a job: parameters, tokens, steps, memory per worker by part, and whether it fits."""
    guarded(lambda: _plan(_config(job, assignments), device, as_json))


def _config(path: Path, assignments: list[str]) -> Callable[[], RunConfig]:
    def load() -> RunConfig:
        from finetune_cli.jobfile import read_job, run_config

        return run_config(read_job(path, assignments), path, assignments)

    return load


def _run(config: Callable[[], RunConfig], resume: bool, fresh: bool) -> None:
    run = config()
    from finetune_trainer.runtime import apply_environment, quiet_environment

    apply_environment(quiet_environment(accelerator=True))
    from finetune_trainer.launch.fork_imports import forks

    # The fork server imports the libraries of the workers while this process imports them too and checks the job.
    with forks(run, logging.getLogger(__name__).info):
        _execute(run, resume, fresh)


def _execute(run: RunConfig, resume: bool, fresh: bool) -> None:
    from finetune_trainer.launch.pipeline import Pipeline
    from finetune_trainer.progress.console_reporter import reporter_for

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _Stopper(stop))
    reporter = reporter_for(sys.stdout)
    try:
        Pipeline(run, reporter, stop).execute(resume=resume, fresh=fresh)
    finally:
        reporter.close()


class _Stopper:
    """Signal handler: the first signal requests a checkpoint, the second one ends the process at once."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, number: int, frame: Any) -> None:
        if self.stop.is_set():
            raise SystemExit(ExitCode.FAILED)
        self.stop.set()
        print("stopping after this step with a checkpoint; repeat to stop at once", file=sys.stderr, flush=True)


def _validate(config: Callable[[], RunConfig], schema_only: bool) -> None:
    run = config()
    if not schema_only:
        from finetune_trainer.runtime import apply_environment, quiet_environment

        apply_environment(quiet_environment(accelerator=True))
        from finetune_trainer.preflight.checkpoints import checkpoint_notes
        from finetune_trainer.preflight.data import data_notes
        from finetune_trainer.preflight.job import preflight
        from finetune_trainer.preflight.rows import first_row_problems

        plan = preflight(run)
        if problems := first_row_problems(run):
            raise UserError(problems)
        for note in data_notes(run):
            print(note)
        for note in checkpoint_notes(run):
            print(f"model: {note}")
        for stage in plan.stages:
            for warning in stage.warnings:
                print(f"warning: {warning}")
    stages = ", ".join(stage.title for stage in run.job.spec.stages)
    print(f"{run.job.metadata.name}: valid ({stages})")


def _plan(config: Callable[[], RunConfig], device: str | None, as_json: bool) -> None:
    run = config()
    from finetune_cli.plan_view import show_plan

    show_plan(run, device, as_json)
