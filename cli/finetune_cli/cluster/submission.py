"""`submit`, `suspend` and `resume`: create, update, suspend and resume a job on a cluster."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import typer

from finetune_api.exit_codes import ExitCode
from finetune_api.job import FineTuneJob
from finetune_api.problems import Problem
from finetune_cli.cluster.connection import Target, connect
from finetune_cli.cluster.errors import CONFLICT, NOT_FOUND, ApiError
from finetune_cli.cluster.jobs import Jobs
from finetune_cli.cluster.reading import condition_of, has_ended, phase_of, status_of, wants_suspension
from finetune_cli.cluster.status import watch_one
from finetune_trainer.errors import UserError

Json = dict[str, Any]


def submit(job: FineTuneJob, target: Target, *, update: bool, dry_run: bool) -> None:
    """Create the job, or with `update` change an existing one. Print the result and the next commands.

    Raises:
        UserError: the API server rejects the job (one problem per field), or it exists and `update` is not set.
    """
    jobs = _jobs_for(job, target)
    name, existing = job.metadata.name, None
    if update:
        existing = _existing(jobs, name)
    try:
        made = jobs.update(job, dry_run=dry_run) if existing else jobs.create(job, dry_run=dry_run)
    except UserError as error:
        if isinstance(error.__cause__, ApiError) and error.__cause__.code == CONFLICT:
            raise _taken(jobs, name) from error
        raise
    _say(made, existing, dry_run, target)


def follow_to_the_end(job: FineTuneJob, target: Target) -> None:
    """Show the status of the job until it ends. Exit with code 1 if it fails."""
    try:
        ended = watch_one(_jobs_for(job, target), job.metadata.name)
    except KeyboardInterrupt:
        print(f"{job.metadata.name} continues; `finetune suspend {job.metadata.name}` stops it", file=sys.stderr)
        raise typer.Exit(130) from None
    if condition_of(ended, "Succeeded").get("status") != "True":
        raise typer.Exit(int(ExitCode.FAILED))


def set_suspension(jobs: Jobs, name: str, wanted: bool, flags: str) -> None:
    """Suspend or resume the job.

    Args:
        flags: command-line options that select the same cluster, for the printed next command.

    Raises:
        UserError: the job does not exist, or has ended.
    """
    job = jobs.read(name)
    if has_ended(job):
        raise UserError(
            f"job {name!r} has ended ({phase_of(job)}): it cannot be {'suspended' if wanted else 'resumed'}"
        )
    if wants_suspension(job) is wanted:
        print(f"{name}: no change, it is {phase_of(job)}")
        return
    jobs.suspend(name, wanted)
    goal = "Suspended" if wanted else "Running"
    action = "saves a checkpoint and stops" if wanted else "continues from its last checkpoint"
    print(f"{name} {action}\nnext: finetune wait {name} --for {goal}{flags}")


def _jobs_for(job: FineTuneJob, target: Target) -> Jobs:
    """Return the jobs of the namespace that the command line, the job or the context sets, in this order."""
    written = job.metadata.namespace
    if written is not None and target.namespace not in (None, written):
        raise UserError([Problem("metadata.namespace", f"is {written!r}, but --namespace is {target.namespace!r}")])
    cluster = connect(dataclasses.replace(target, namespace=target.namespace or written))
    return Jobs(cluster, cluster.namespace)


def _existing(jobs: Jobs, name: str) -> Json | None:
    try:
        return jobs.read(name)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ApiError) and cause.code == NOT_FOUND and cause.details.get("name"):
            return None
        raise


def _taken(jobs: Jobs, name: str) -> UserError:
    phase = phase_of(jobs.read(name))
    return UserError(
        f"job {name!r} already exists in namespace {jobs.namespace} ({phase}): use another name "
        f"(--set metadata.name=...), change its runPolicy (--update), or run `finetune delete {name}` first"
    )


def _say(made: Json, existing: Json | None, dry_run: bool, target: Target) -> None:
    name, namespace = made["metadata"]["name"], made["metadata"]["namespace"]
    if dry_run:
        print(f"{name}: valid in namespace {namespace}; nothing was {'changed' if existing else 'created'}")
        return
    unchanged = existing is not None and existing["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    done = "unchanged" if unchanged else "changed" if existing is not None else "created"
    print(f"{name} {done} in namespace {namespace}")
    if existing is None or not status_of(existing).get("completionTime"):
        flags = dataclasses.replace(target, namespace=target.namespace or made["metadata"]["namespace"]).flags()
        print(f"next: finetune status {name} --watch{flags}; finetune logs {name} -f{flags}")
