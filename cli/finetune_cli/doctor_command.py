"""`doctor`: what this machine has, and lacks, of what a GPU node or a job needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.exit_codes import ExitCode
from finetune_cli.outcome import guarded

if TYPE_CHECKING:
    from finetune_api.job import FineTuneJob
    from finetune_trainer.doctor.facts import Facts
    from finetune_trainer.doctor.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "missing": "bold red", "not needed": "dim"}
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the job. May be given several times."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor_command)


def doctor_command(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="A job whose needs are checked.")] = None,
    assignments: Assignments = [],  # noqa: B006  # typer's form
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and facts as JSON.")] = False,
) -> None:
    """Check what this machine has of what a job needs, or without a job, of what a GPU node needs.

    A table of checks: what was found, what is needed, and the remedy. Exit codes: 0 nothing is missing, 1 something is
    that the job needs (without a job: and this machine has GPUs), 2 the job is wrong.
    """
    guarded(lambda: _doctor(job, assignments, as_json))


def _doctor(path: Path | None, assignments: list[str], as_json: bool) -> None:
    from finetune_cli.jobfile import cache_dir, read_job

    job = None if path is None else read_job(path, assignments)
    from finetune_trainer.doctor.examine import examine
    from finetune_trainer.doctor.finding import missing
    from finetune_trainer.doctor.gather import gather
    from finetune_trainer.doctor.needs import gpu_node, job_needs

    facts = gather(cache_dir(), ask_hub=True)
    here = len(facts.torch.gpus) or facts.driver.devices
    findings = examine(facts, gpu_node() if job is None else job_needs(job, here))
    lacks = missing(findings)
    if as_json:
        print(json.dumps(_to_json(findings, facts, job), indent=1))
    else:
        _print(findings, job, has_gpus=here > 0)
    if lacks and (job is not None or here):
        raise typer.Exit(int(ExitCode.FAILED))


def _to_json(findings: list[Finding], facts: Facts, job: FineTuneJob | None) -> dict[str, object]:
    of_facts = asdict(facts) | {"packages": {name: asdict(package) for name, package in facts.packages.items()}}
    name = None if job is None else job.metadata.name
    return {"job": name, "findings": [one.to_json() for one in findings], "facts": of_facts}


def _print(findings: list[Finding], job: FineTuneJob | None, *, has_gpus: bool) -> None:
    """The table; where there is no GPU and no job, what it means is said below it."""
    table = Table(
        title="What a GPU node needs" if job is None else f"What {job.metadata.name} needs", title_justify="left"
    )
    for column in ("check", "state", "found", "needed, and what to do"):
        table.add_column(column, overflow="fold")
    for one in findings:
        style = STYLES[one.state.value]
        what = Text(one.needed).append(f"\n{one.remedy}", style) if one.remedy else Text(one.needed)
        table.add_row(one.name, Text(one.state.value, style), Text(one.found), what)
    console = Console()
    console.print(table)
    count = sum(one.state.value == "missing" for one in findings)
    if job is None and not has_gpus:
        console.print(
            f"This machine has no GPU. A GPU node like it would lack what is marked missing ({count} checks)."
        )
    else:
        console.print("Nothing is missing." if not count else f"{count} checks found something missing.")
