"""The commands for jobs on a cluster: `submit`, `status`, `logs`, `suspend`, `resume`, `delete` and `wait`."""

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
"""Exit code of shells after SIGINT."""

JobName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace. Default: that of the kubeconfig context, else `default`."),
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: the current context.")]
Kubeconfig = Annotated[
    str | None, typer.Option(metavar="FILE", help="Path of the kubeconfig. Default: $KUBECONFIG, else ~/.kube/config.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    commands: dict[str, Callable[..., None]] = {
        "submit": submit_command,
        "status": status_command,
        "logs": logs_command,
        "suspend": suspend_command,
        "resume": resume_command,
        "delete": delete_command,
        "wait": wait_command,
    }
    for name, command in commands.items():
        app.command(name, rich_help_panel=PANEL)(command)


def submit_command(
    job: JobFile,
    assignments: Assignments = [],  # noqa: B006
    update: Annotated[
        bool,
        typer.Option("--update", help="If the job exists, update its runPolicy, labels and annotations."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the job on the cluster without creating it.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Show the status until the job ends. Exit code 1 if it fails.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Create a job on the cluster. The job is validated first: all problems are reported at once, with exit code 2."""
    target = (namespace, context, kubeconfig)
    guarded(lambda: _submit(job, assignments, update, dry_run, wait, *target))


def status_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of a job. Default: list all jobs.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep updating: a live view on a terminal, else one line per change.")
    ] = False,
    output: Annotated[
        Literal["json", "yaml"] | None, typer.Option("--output", "-o", help="Print the complete object.")
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List the jobs of all namespaces.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List jobs, or show one job with its progress, stages, conditions, attempts and failure.

    With `--watch`, a single job is shown until it ends, and a list until Ctrl-C.
    """
    if watch and output is not None:
        raise typer.BadParameter("--watch and --output are mutually exclusive")
    if all_namespaces and name is not None:
        raise typer.BadParameter("--all-namespaces cannot be combined with NAME: use -n NAMESPACE")

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
        bool, typer.Option("--follow", "-f", help="Follow the log. Without --attempt, continue with later attempts.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Number of the attempt. Default: the latest.")] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="Print the log of the preflight.")] = False,
    node: Annotated[int, typer.Option(min=0, help="Index of the node. Node 0 runs the driver.")] = 0,
    tail: Annotated[
        int | None, typer.Option(min=0, help="Number of lines from the end of the log. Default: all.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the log of the driver of a job (node 0), or of another node."""
    if preflight and attempt is not None:
        raise typer.BadParameter("--preflight and --attempt are mutually exclusive")

    def action() -> None:
        from finetune_cli.cluster.logs import Logs

        logs = Logs(_jobs(namespace, context, kubeconfig), name, node, tail)
        (logs.follow if follow else logs.print)(0 if preflight else attempt)

    _watching(action)


def suspend_command(
    name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None
) -> None:
    """Save a checkpoint and stop the pods of a job. `finetune resume` continues from the checkpoint."""
    guarded(lambda: _set_suspension(name, True, namespace, context, kubeconfig))


def resume_command(
    name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None
) -> None:
    """Continue a suspended job from its last checkpoint."""
    guarded(lambda: _set_suspension(name, False, namespace, context, kubeconfig))


def delete_command(
    name: JobName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a job and its pods. Checkpoints and results in storage are kept, unless its deletionPolicy is Delete."""
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
    timeout: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Maximum time to wait, such as 90s, 15m or 2h. Default: no limit."),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Wait until a job succeeds, or reaches another state (`--for`).

    Exit codes: 0 the state was reached, 1 the job ended in another state, 2 the job does not exist, 124 timeout.
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
        raise UserError("cannot ask for confirmation without a terminal: use --yes")
    question = f"Delete job {name} and its pods in namespace {jobs.namespace}?"
    if not yes and not typer.confirm(question):
        print("nothing was deleted")
        return
    jobs.delete(name)
    print(f"{name} deleted from namespace {jobs.namespace}")


def _jobs(namespace: str | None, context: str | None, kubeconfig: str | None, *, everywhere: bool = False) -> Jobs:
    from finetune_cli.cluster.connection import connect
    from finetune_cli.cluster.jobs import Jobs

    cluster = connect(_target(namespace, context, kubeconfig))
    return Jobs(cluster, None if everywhere else cluster.namespace)


def _target(namespace: str | None, context: str | None, kubeconfig: str | None) -> Target:
    from finetune_cli.cluster.connection import Target

    return Target(namespace, context, kubeconfig)


def _watching(action: Callable[[], None]) -> None:
    """Run an action until Ctrl-C. The job continues."""
    try:
        guarded(action)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
