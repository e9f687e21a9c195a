"""Runs the preflight of a job on a cluster, in a pod without GPUs, before the job claims any GPU.

Most of the time goes into imports. Common libraries are imported first; then a forked process checks the data while
this process checks the model.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.exit_codes import ExitCode
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.slots import workers_per_node
from finetune_trainer.launch.drive import report_outcome
from finetune_trainer.plan.workers import Workers, plan_workers
from finetune_trainer.preflight.gpu_node import image_problems
from finetune_trainer.progress.attempt_report import AttemptReporter, Json
from finetune_trainer.runtime import apply_environment, quiet_environment

if TYPE_CHECKING:
    from finetune_trainer.plan.devices import Device
    from finetune_trainer.plan.records import JobPlan

_UNKNOWN_BYTES = 1 << 50


def run_preflight(config: Path) -> ExitCode:
    """Check a job's model, data, storage and memory, and this image if the job uses GPUs.

    The plan, or the problems of the job, go into the termination message.
    """
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=False))
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return report_outcome(reporter, lambda: _check(run, reporter))


def _check(run: RunConfig, reporter: AttemptReporter) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    with ProcessPoolExecutor(1, get_context("fork")) as process, ThreadPoolExecutor(1) as thread:
        row_check = process.submit(_row_problems, run)  # before the thread: forking a process with threads is unsafe
        image_check = thread.submit(image_problems, run)
        plan = _plan(run, [image_check, row_check])
        reporter.planned(_plan_report(plan) | _saving_report(run, plan))
    print(f"{run.job.metadata.name}: preflight passed", file=sys.stdout, flush=True)


def _row_problems(run: RunConfig) -> list[Problem]:
    from finetune_trainer.preflight.rows import row_problems

    return row_problems(run)


def _plan(run: RunConfig, checks: list[Future[list[Problem]]]) -> JobPlan:
    from finetune_trainer.preflight.job import plan_of_faultless

    workers = plan_workers(run.job.spec.resources)
    problems = (problem for check in checks for problem in check.result())
    return plan_of_faultless(run, workers, _device(run, workers), lambda: problems, on_node=False)


def _device(run: RunConfig, workers: Workers) -> Device:
    """Return the device of a worker as the job describes it: the GPUs of the nodes are not known yet."""
    from finetune_trainer.plan.devices import Device
    from finetune_trainer.plan.quantities import parse_quantity

    resources = run.job.spec.resources
    if workers.accelerator or resources.memory_per_node is None:
        return Device("unknown", _UNKNOWN_BYTES, "cuda" if workers.accelerator else "cpu")
    per_node = int(parse_quantity(resources.memory_per_node))
    return Device("CPU", per_node // workers_per_node(resources), "cpu")


def _saving_report(run: RunConfig, plan: JobPlan) -> Json:
    """Return the size of a checkpoint, the seconds to save it, and a warning if the grace period is too short."""
    from finetune_trainer.plan.saving import grace_warning
    from finetune_trainer.preflight.saving import job_saving, measured_speed
    from finetune_trainer.storage.filesystem import Storage

    saving = job_saving(run, plan, measured_speed(Storage(run.root), plan))
    if saving is None:
        return {}
    warning = grace_warning(saving, run.job.spec.kubernetes.checkpoint_grace_seconds)
    if warning:
        print(f"warning: {warning}", flush=True)
    report: Json = {"checkpointBytes": saving.size, "saveSeconds": math.ceil(saving.seconds)}
    return report | ({"warnings": [warning]} if warning else {})


def _plan_report(plan: JobPlan) -> Json:
    if not plan.stages:
        return {"parameters": 0}
    steps = [stage.steps.total for stage in plan.stages]
    return {
        "parameters": max(stage.parameters for stage in plan.stages),
        "memoryBytes": max(stage.memory.total for stage in plan.stages),
        "zero": max(stage.zero for stage in plan.stages),
        **({"hostBytes": plan.host_bytes} if plan.host_bytes is not None else {}),
        **({"steps": sum(filter(None, steps))} if all(steps) else {}),
    }
