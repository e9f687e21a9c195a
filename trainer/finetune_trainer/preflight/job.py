"""Preflight of a job: return its plan, or report all of its faults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import torch

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.host_memory import host_memory
from finetune_trainer.plan.devices import Device, local_device
from finetune_trainer.plan.records import JobPlan
from finetune_trainer.plan.workers import Workers, plan_workers
from finetune_trainer.preflight.data import data_problems
from finetune_trainer.preflight.gpu_node import machine_problems
from finetune_trainer.preflight.host import host_problems
from finetune_trainer.preflight.model import model_plan
from finetune_trainer.preflight.saving import room_problems
from finetune_trainer.preflight.settings import setting_problems
from finetune_trainer.stage_graph import place


def preflight(run: RunConfig, workers: Workers | None = None) -> JobPlan:
    """Check a job, its model and its data on this machine without training, and return its plan.

    Raises:
        UserError: the job has faults, one problem each.
    """
    workers = workers or plan_workers(run.job.spec.resources)
    unusable = list(_resources(run, workers))
    others = [*unusable, *data_problems(run)]
    try:
        machine = None if os.environ.get("RAY_ADDRESS") else host_memory()
        return plan_of_faultless(run, workers, local_device(workers.most), lambda: others, machine=machine)
    except RuntimeError:
        if unusable:  # torch raises other errors on unusable GPUs
            raise UserError(others) from None
        raise


def plan_of_faultless(
    run: RunConfig,
    workers: Workers,
    device: Device,
    others: Callable[[], Iterable[Problem]],
    *,
    machine: int | None = None,
    on_node: bool = True,
) -> JobPlan:
    """Return the plan of a job, or raise all of its faults.

    Args:
        device: device of each worker.
        others: returns the problems of other checks; called after the model is checked.
        machine: bytes of host memory that the job can use on this machine; None if it runs on other machines.
        on_node: whether this process runs on a node of the job.

    Raises:
        UserError: the job has faults, one problem each.
    """
    plan, of_model = _model(run, workers, device)
    problems = [*setting_problems(run, workers), *others()]
    problems += host_problems(run, plan, machine) if plan is not None else []
    problems += [problem for problem in of_model if not _is_reported(problem, problems, run)]
    problems += room_problems(run, plan, on_node=on_node) if plan is not None else []
    if problems or plan is None:
        raise UserError(list(dict.fromkeys(problems)))
    return plan


def _model(run: RunConfig, workers: Workers, device: Device) -> tuple[JobPlan | None, list[Problem]]:
    try:
        return model_plan(run, workers, device), []
    except UserError as error:
        return None, error.problems


def _resources(run: RunConfig, workers: Workers) -> Iterator[Problem]:
    """Yield what this machine lacks for GPUs. On a cluster, each node is checked instead."""
    if workers.accelerator and not os.environ.get("RAY_ADDRESS"):
        yield from machine_problems(run, workers.least, torch.cuda.device_count())


def _is_reported(problem: Problem, reported: list[Problem], run: RunConfig) -> bool:
    """Return whether another problem is already reported for the same `synthesize` stage."""
    stages = enumerate(run.job.spec.stages)
    paths = [place(run, index) for index, stage in stages if stage.synthesize is not None]
    return any(problem.path.startswith(path) and any(one.path.startswith(path) for one in reported) for path in paths)
