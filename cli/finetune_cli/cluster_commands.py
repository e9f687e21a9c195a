"""`submit`, `status`, `logs`, `suspend`, `resume`, `delete` and `wait`: jobs on the cluster of the kube context."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune_cli.job_commands import Assignments, JobFile
from finetune_cli.outcome import guarded

if TYPE_CHECKING:
    from finetune_cli.cluster.connection import Target
    from finetune_cli.cluster.jobs import Jobs

PANEL = "On a Kubernetes cluster"
INTERRUPTED = 130
"""As a shell has it after Ctrl-C."""

JobName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: the kube context's, else `default`.")
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: the current one.")]
Kubeconfig = Annotated[
    str | None, typer.Option(metavar="FILE", help="The kubeconfig. Default: $KUBECONFIG, else ~/.kube/config.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for name, command in {
        "submit": submit_command,
        "status": status_command,
        "logs": logs_command,
        "suspend": suspend_command,
        "resume": resume_command,
        "delete": delete_command,
        "wait": wait_command,
    }.items():
        app.command(name, rich_help_panel=PANEL)(command)


def submit_command(
    job: JobFile,
    assignments: Assignments = [],  # noqa: B006
    update: Annotated[
        bool,
        typer.Option("--update", help="Where the job exists, change its runPolicy, labels and annotations."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Have the cluster check the job, make nothing.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Show the status until the job has ended; exit code 1 if it failed.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Create a job on the cluster, checked as `finetune run` does. Every fault at once; exit code 2 if any."""
    target = (namespace, context, kubeconfig)
    guarded(lambda: _submit(job, assignments, update, dry_run, wait, *target))


def status_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of a job. Default: list them.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on: live on a terminal, else as lines.")] = False,
    output: Annotated[Literal["json", "yaml"] | None, typer.Option("--output", "-o", help="The whole object.")] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="List every namespace's.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show jobs, or one with its progress, stages, conditions, attempts and failure.

    With `--watch`, one job is shown until it has ended, a list until Ctrl-C.
    """
    if watch and output is not None:
        raise typer.BadParameter("--watch and --output exclude each other")
    if all_namespaces and name is not None:
        raise typer.BadParameter("--all-namespaces lists jobs: a NAME belongs to one namespace")

    def action() -> None:
        from finetune_cli.cluster import status

        jobs = _jobs(namespace, context, kubeconfig, everywhere=all_namespaces)
        if not watch:
            status.show(jobs, name, output)
        elif name is None:
            status.watch_all(jobs)
        else:
            status.watch_one(jobs, name)

    _watching(action)


def logs_command(
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as it grows; without --attempt, from attempt to attempt.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt's. Default: the newest.")] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="The preflight's.")] = False,
    node: Annotated[int, typer.Option(min=0, help="Which node's, from 0, which drives.")] = 0,
    tail: Annotated[int | None, typer.Option(min=0, help="This many lines from the end. Default: all.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the log of the pod that drives a job (node 0), or of another of its nodes."""
    if preflight and attempt is not None:
        raise typer.BadParameter("--preflight and --attempt exclude each other")

    def action() -> None:
        from finetune_cli.cluster.logs import Logs

        logs = Logs(_jobs(namespace, context, kubeconfig), name, node, tail)
        (logs.follow if follow else logs.print)(0 if preflight else attempt)

    _watching(action)


def suspend_command(
    name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None
) -> None:
    """Save a checkpoint and stop a job's pods; `finetune resume` goes on from it."""
    guarded(lambda: _set_suspension(name, True, namespace, context, kubeconfig))


def resume_command(
    name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None
) -> None:
    """Let a suspended job go on from its last checkpoint."""
    guarded(lambda: _set_suspension(name, False, namespace, context, kubeconfig))


def delete_command(
    name: JobName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a job and its pods. Its checkpoints and results stay in storage."""
    guarded(lambda: _delete(name, yes, namespace, context, kubeconfig))


def wait_command(
    name: JobName,
    goal: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="WHAT",
            help="Succeeded, Failed, Running, Suspended, Admitted, Planned, Validated or Deleted.",
        ),
    ] = "Succeeded",
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Such as 90s, 15m or 2h. Default: none.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Wait until a job succeeds, or gets elsewhere.

    Exit codes: 0 it did, 1 it ended otherwise, 2 there is no such job, 124 the time is over.
    """

    def action() -> None:
        from finetune_cli.cluster.waiting import goal_of, seconds_of, wait

        wanted, seconds = goal_of(goal), seconds_of(timeout) if timeout is not None else None
        outcome = wait(_jobs(namespace, context, kubeconfig), name, wanted, seconds)
        print(outcome.message, file=sys.stderr if outcome.code else sys.stdout)
        raise typer.Exit(outcome.code)

    _watching(action)


def _submit(
    path: Path,
    assignments: list[str],
    update: bool,
    dry_run: bool,
    wait: bool,
    namespace: str | None,
    context: str | None,
    kubeconfig: str | None,
) -> None:
    from finetune_cli.cluster.submission import follow_to_the_end, submit
    from finetune_cli.jobfile import read_job

    job = read_job(path, assignments)
    target = _target(namespace, context, kubeconfig)
    submit(job, target, update=update, dry_run=dry_run)
    if wait and not dry_run:
        follow_to_the_end(job, target)


def _set_suspension(name: str, wanted: bool, namespace: str | None, context: str | None, file: str | None) -> None:
    from finetune_cli.cluster.submission import set_suspension

    set_suspension(_jobs(namespace, context, file), name, wanted, _target(namespace, context, file).flags())


def _delete(name: str, yes: bool, namespace: str | None, context: str | None, kubeconfig: str | None) -> None:
    from finetune_trainer.errors import UserError

    jobs = _jobs(namespace, context, kubeconfig)
    jobs.read(name)
    if not yes and not sys.stdin.isatty():
        raise UserError("there is no terminal to ask at: --yes deletes without asking")
    question = f"Delete job {name} in namespace {jobs.namespace}, and its pods? Checkpoints and results stay."
    if not yes and not typer.confirm(question):
        print("nothing was deleted")
        return
    jobs.delete(name)
    print(f"{name} deleted from namespace {jobs.namespace}; checkpoints and results are still in storage")


def _jobs(namespace: str | None, context: str | None, kubeconfig: str | None, *, everywhere: bool = False) -> Jobs:
    from finetune_cli.cluster.connection import connect
    from finetune_cli.cluster.jobs import Jobs

    cluster = connect(_target(namespace, context, kubeconfig))
    return Jobs(cluster, None if everywhere else cluster.namespace)


def _target(namespace: str | None, context: str | None, kubeconfig: str | None) -> Target:
    from finetune_cli.cluster.connection import Target

    return Target(namespace, context, kubeconfig)


def _watching(action: Callable[[], None]) -> None:
    """Run an action that Ctrl-C ends; the job runs on."""
    try:
        guarded(action)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
