"""Preflight on a cluster: in a pod without GPUs, before any GPU is claimed.

Most of its time goes into imports. What both need is imported first; then a fork looks at the data while this process
looks at the model.
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
    """Check a job's model, data, storage, memory and, for GPUs, this image.

    The plan, or the job's faults, go into the termination message.
    """
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=False))
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return report_outcome(reporter, lambda: _check(run, reporter))


def _check(run: RunConfig, reporter: AttemptReporter) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    with ProcessPoolExecutor(1, get_context("fork")) as beside, ThreadPoolExecutor(1) as waiting:
        of_rows = beside.submit(_row_problems, run)  # first: a process with threads is not to be forked
        of_image = waiting.submit(image_problems, run)
        plan = _plan(run, [of_image, of_rows])
        reporter.planned(_told(plan) | _saving(run, plan))
    print(f"{run.job.metadata.name}: can work", file=sys.stdout, flush=True)


def _row_problems(run: RunConfig) -> list[Problem]:
    from finetune_trainer.preflight.rows import row_problems

    return row_problems(run)


def _plan(run: RunConfig, others: list[Future[list[Problem]]]) -> JobPlan:
    from finetune_trainer.preflight.job import plan_of_faultless

    workers = plan_workers(run.job.spec.resources)
    found = (problem for other in others for problem in other.result())
    return plan_of_faultless(run, workers, _device(run, workers), lambda: found, on_node=False)


def _device(run: RunConfig, workers: Workers) -> Device:
    """What a worker will have, as far as the job says: nobody knows a node's GPUs before it has one."""
    from finetune_trainer.plan.devices import Device
    from finetune_trainer.plan.quantities import parse_quantity

    resources = run.job.spec.resources
    if workers.accelerator or resources.memory_per_node is None:
        return Device("unknown", _UNKNOWN_BYTES, "cuda" if workers.accelerator else "cpu")
    per_node = int(parse_quantity(resources.memory_per_node))
    return Device("CPU", per_node // workers_per_node(resources), "cpu")


def _saving(run: RunConfig, plan: JobPlan) -> Json:
    """Return what the report says of checkpoints: size, seconds, and a warning where the grace period is too short."""
    from finetune_trainer.plan.saving import grace_warning
    from finetune_trainer.preflight.saving import job_saving, measured_speed
    from finetune_trainer.storage.filesystem import Storage

    found = job_saving(run, plan, measured_speed(Storage(run.root), plan))
    if found is None:
        return {}
    warning = grace_warning(found, run.job.spec.kubernetes.checkpoint_grace_seconds)
    if warning:
        print(f"warning: {warning}", flush=True)
    told: Json = {"checkpointBytes": found.size, "saveSeconds": math.ceil(found.seconds)}
    return told | ({"warnings": [warning]} if warning else {})


def _told(plan: JobPlan) -> Json:
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
