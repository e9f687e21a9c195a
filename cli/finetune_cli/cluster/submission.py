"""`submit`, `suspend` and `resume`: a job goes to the cluster, or is told to stop or go on."""

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
    """Create the job, or with `update` change the one that exists; says what to do next.

    Raises:
        UserError: the API server refuses it, one problem for each field; or it exists, and `update` is not set.
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
    """Show the job's status until it has ended; ends the command with exit code 1 if it failed."""
    try:
        ended = watch_one(_jobs_for(job, target), job.metadata.name)
    except KeyboardInterrupt:
        print(f"{job.metadata.name} runs on; `finetune suspend {job.metadata.name}` stops it", file=sys.stderr)
        raise typer.Exit(130) from None
    if condition_of(ended, "Succeeded").get("status") != "True":
        raise typer.Exit(int(ExitCode.FAILED))


def set_suspension(jobs: Jobs, name: str, wanted: bool, flags: str) -> None:
    """Suspend the job or let it go on.

    Args:
        flags: options that lead back to the same cluster, for commands to run next.

    Raises:
        UserError: there is no such job, or it has ended.
    """
    job = jobs.read(name)
    if has_ended(job):
        raise UserError(f"job {name!r} is over ({phase_of(job)}): there is nothing to {'stop' if wanted else 'resume'}")
    if wants_suspension(job) is wanted:
        print(f"{name}: nothing to do, it is {phase_of(job)}")
        return
    jobs.suspend(name, wanted)
    goal = "Suspended" if wanted else "Running"
    words = "saves a checkpoint and stops" if wanted else "goes on from its last checkpoint"
    print(f"{name} {words}\nnext: finetune wait {name} --for {goal}{flags}")


def _jobs_for(job: FineTuneJob, target: Target) -> Jobs:
    """The jobs of the namespace that the command line, the job or the context names, in that order."""
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
        f"job {name!r} is in namespace {jobs.namespace} already ({phase}): submit under another name "
        f"(--set metadata.name=…), change its runPolicy (--update), or `finetune delete {name}` first"
    )


def _say(made: Json, existing: Json | None, dry_run: bool, target: Target) -> None:
    name, namespace = made["metadata"]["name"], made["metadata"]["namespace"]
    if dry_run:
        print(f"{name}: valid in namespace {namespace}; nothing was {'changed' if existing else 'made'}")
        return
    unchanged = existing is not None and existing["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    done = "unchanged" if unchanged else "changed" if existing is not None else "created"
    print(f"{name} {done} in namespace {namespace}")
    if existing is None or not status_of(existing).get("completionTime"):
        flags = dataclasses.replace(target, namespace=target.namespace or made["metadata"]["namespace"]).flags()
        print(f"next: finetune status {name} --watch{flags}; finetune logs {name} -f{flags}")
