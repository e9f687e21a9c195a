"""Check that the model of a job can be built, adapted, sharded and held in memory, and plan it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.model.saved_model import is_result, root_of
from finetune_trainer.model.source import local_path
from finetune_trainer.model.weights import weight_faults
from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.job import job_config, plan_job
from finetune_trainer.plan.records import JobPlan, PlanContext
from finetune_trainer.plan.workers import Workers
from finetune_trainer.preflight.checkpoints import checkpoint_problems
from finetune_trainer.preflight.packing import packing_problems


def model_plan(run: RunConfig, workers: Workers, device: Device) -> JobPlan:
    """Return the plan of a job whose saved models can be loaded, trained, packed and saved on this device.

    Raises:
        UserError: all faults of the model files, the model, adapters without matching modules, and missing kernels.
        Outage: the Hub does not respond.
    """
    spec = run.job.spec.model
    missing = list(_paths(run))
    kernel = "flash_attn" if spec.attn_implementation == "flash_attention_2" else "flash_attn_interface"
    if spec.attn_implementation.startswith("flash") and find_spec(kernel) is None:
        missing.append(Problem("model.attnImplementation", f"{spec.attn_implementation} needs the package {kernel}"))
    if missing:
        raise UserError(missing)
    problems = list(checkpoint_problems(run))
    try:
        config = job_config(run)
        plan = plan_job(run, PlanContext(device, workers.most, config))
        problems += packing_problems(run, config, workers.accelerator)
    except UserError as error:
        raise UserError([*problems, *error.problems]) from error
    if problems:
        raise UserError(problems)
    return plan


def _paths(run: RunConfig) -> Iterator[Problem]:
    path = run.job.spec.model.path
    if path is None:
        return
    directory = local_path(path, run.base_dir)
    if not directory.is_dir():
        yield Problem("model.path", f"no such directory: {path} (looked in {run.base_dir} and the current directory)")
    elif is_result(directory):
        root = Path(root_of(str(directory)))
        yield from (Problem("model.path", fault) for fault in (weight_faults(root) if root.is_dir() else ()))
