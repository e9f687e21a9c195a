"""`finetune plan`: the requirements of a job as tables or JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from finetune_api.problems import Problem, did_you_mean
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.launch.preparation import Preparation
from finetune_trainer.plan import PlanContext, plan_job, render
from finetune_trainer.plan.devices import MEMORIES, Device, known_device, local_device
from finetune_trainer.plan.job import job_config
from finetune_trainer.plan.quantities import parse_quantity
from finetune_trainer.plan.workers import Workers, plan_workers
from finetune_trainer.preflight.packing import packing_problems
from finetune_trainer.storage.filesystem import Storage


def show_plan(run: RunConfig, device: str | None, as_json: bool) -> None:
    """Print the plan. If the tokenizer exists already, the data is tokenized and cached for the run.

    Raises:
        UserError: the job cannot be planned, or the device is not known.
    """
    workers = plan_workers(run.job.spec.resources)
    place = _device(device, workers)
    known = _preparation(run, workers)
    context = PlanContext(place, workers.most, known.config if known else None)
    plan = plan_job(run, context, lambda index: known.prepare(index) if known else None)
    if mixed := list(packing_problems(run, context.config or job_config(run), workers.accelerator)):
        raise UserError(mixed)
    if as_json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        Console().print(render(plan))


def _device(name: str | None, workers: Workers) -> Device:
    if name is None:
        return local_device(workers.most)
    known = known_device(name)
    if known is not None:
        return known
    try:
        return replace(local_device(), name=name, memory_bytes=parse_quantity(name), kind="cuda")
    except ValueError:
        message = f"{name!r} is neither a known device nor a size such as 80Gi{did_you_mean(name, MEMORIES)}"
        raise UserError([Problem("--device", message)]) from None


def _preparation(run: RunConfig, workers: Workers) -> Preparation | None:
    """Return the preparation that determines the size of the data, or None if a stage trains the tokenizer."""
    if run.job.spec.stages[0].tokenizer is not None:
        return None
    return Preparation(run, workers, Storage(run.root), log=lambda line: None)
