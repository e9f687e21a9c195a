"""Preflight on a cluster: in a pod without GPUs, before any GPU is claimed."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune_api.exit_codes import ExitCode
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import EvaluateSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.data.sample import sample_problems
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.rows import eval_rows
from finetune_trainer.launch.attempt import say_last_word
from finetune_trainer.launch.cluster import Workers, plan_workers
from finetune_trainer.model.load import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.pipeline import place, waits_for
from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.quantities import parse_quantity
from finetune_trainer.plan.records import JobPlan
from finetune_trainer.preflight import preflight
from finetune_trainer.progress.attempt import AttemptReporter, Json
from finetune_trainer.runtime import apply_environment, quiet_environment
from finetune_trainer.storage import Storage

_UNKNOWN_BYTES = 1 << 50
PREFLIGHT_SECONDS = 20.0
"""How long a store may take to answer a preflight: a wrong address never does."""


def run_preflight(config: Path) -> ExitCode:
    """Check a job's model, data, storage and memory; the plan, or its faults, go into the termination message."""
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=False))
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return say_last_word(reporter, lambda: _check(run, reporter))


def _check(run: RunConfig, reporter: AttemptReporter) -> None:
    _writable(run)
    workers = plan_workers(run.job.spec.resources)
    reporter.planned(_plan(preflight(run, workers, device=_device(run, workers))))
    problems = list(_sample(run))
    if problems:
        raise UserError(problems)
    print(f"{run.job.metadata.name}: can work", file=sys.stdout, flush=True)


def _sample(run: RunConfig) -> Iterator[Problem]:
    """Faults in the first rows of each stage's data; a tokenizer that is yet to be trained can't show any."""
    stages = run.job.spec.stages
    if stages[0].tokenizer is not None:
        return
    source = stage_source(run, 0, Storage(run.root))
    tokenizer = load_tokenizer(source)
    context = context_length(load_config(source, tokenizer))
    for index, stage in enumerate(stages):
        if list(waits_for(run, index)):
            continue
        if isinstance(stage.spec, EvaluateSpec):
            yield from _rows(run, index, stage.spec, tokenizer, context)
        if isinstance(stage.spec, TrainingSpec):
            yield from sample_problems(stage.spec, tokenizer, context, place(run, index), Path(run.base_dir))


def _rows(
    run: RunConfig, index: int, spec: EvaluateSpec, tokenizer: PreTrainedTokenizerFast, context: int | None
) -> list[Problem]:
    """Faults in the rows of an evaluation, which are read whole."""
    try:
        eval_rows(spec, tokenizer, context, place(run, index), Path(run.cache_dir), Path(run.base_dir))
    except UserError as error:
        return error.problems
    return []


def _device(run: RunConfig, workers: Workers) -> Device:
    """What a worker will have, as far as the job says: nobody knows a node's GPUs before it has one."""
    resources = run.job.spec.resources
    if workers.accelerator or resources.memory_per_node is None:
        return Device("unknown", _UNKNOWN_BYTES, "cuda" if workers.accelerator else "cpu")
    per_node = resources.workers_per_node or 1
    return Device("CPU", int(parse_quantity(resources.memory_per_node)) // per_node, "cpu")


def _plan(plan: JobPlan) -> Json:
    if not plan.stages:
        return {"parameters": 0}
    steps = [stage.steps.total for stage in plan.stages]
    return {
        "parameters": max(stage.parameters for stage in plan.stages),
        "memoryBytes": max(stage.memory.total for stage in plan.stages),
        "zero": max(stage.zero for stage in plan.stages),
        **({"steps": sum(filter(None, steps))} if all(steps) else {}),
    }


def _writable(run: RunConfig) -> None:
    """Write a file into the job's directory and delete it again.

    Raises:
        UserError: the store can't be reached or doesn't let the job write.
    """
    name = f".preflight-{uuid.uuid4().hex[:8]}"
    field = "storage.uri" if run.job.spec.storage.uri else "storage.path"
    try:
        storage = Storage(run.root, patience=PREFLIGHT_SECONDS)
        storage.write_text(name, "")
        storage.delete(name)
    except Exception as error:  # every store has errors of its own
        raise UserError([Problem(field, f"can't write to {run.root}: {type(error).__name__}: {error}")]) from error
