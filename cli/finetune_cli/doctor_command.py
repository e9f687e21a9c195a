"""The command `doctor`: check this machine against the requirements of a GPU node or of a job."""

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
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the job. Can be repeated."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor_command)


def doctor_command(
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.yaml]", help="The job whose requirements are checked.")
    ] = None,
    assignments: Assignments = [],  # noqa: B006  # typer's form
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and facts as JSON.")] = False,
) -> None:
    """Check whether this machine meets the requirements of a job, or without a job, those of a GPU node.

    The output is a table of checks: what was found, what is needed, and the remedy. Exit codes: 0 nothing is missing,
    1 a requirement of the job is missing (without a job: only if this machine has GPUs), 2 the job is invalid.
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
    lacking = missing(findings)
    if as_json:
        print(json.dumps(_to_json(findings, facts, job), indent=1))
    else:
        _print(findings, job, has_gpus=here > 0)
    if lacking and (job is not None or here):
        raise typer.Exit(int(ExitCode.FAILED))


def _to_json(findings: list[Finding], facts: Facts, job: FineTuneJob | None) -> dict[str, object]:
    of_facts = asdict(facts) | {"packages": {name: asdict(package) for name, package in facts.packages.items()}}
    name = None if job is None else job.metadata.name
    return {"job": name, "findings": [one.to_json() for one in findings], "facts": of_facts}


def _print(findings: list[Finding], job: FineTuneJob | None, *, has_gpus: bool) -> None:
    """Print the table and a summary."""
    table = Table(
        title="Requirements of a GPU node" if job is None else f"Requirements of {job.metadata.name}",
        title_justify="left",
    )
    for column in ("check", "state", "found", "needed, and remedy"):
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
            f"This machine has no GPU. A GPU node with this software would fail the checks marked missing ({count})."
        )
    else:
        console.print("Nothing is missing." if not count else f"{count} checks failed.")
