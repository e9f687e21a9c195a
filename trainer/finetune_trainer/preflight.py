"""What can be known to fail before anything starts: every stage's model, data and settings, all faults at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import DATA_FIELDS, EvaluateSpec, PretrainSpec, PromptSpec, Stage, SynthesizeSpec
from finetune_trainer.data import inspect
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.queries import open_database
from finetune_trainer.evaluation.tasks import task_problems
from finetune_trainer.launch.cluster import Workers, plan_workers
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.model.saved import is_result, root_of
from finetune_trainer.model.source import local_path
from finetune_trainer.model.weights import weight_faults
from finetune_trainer.patience import passing
from finetune_trainer.pipeline import place, stage_before
from finetune_trainer.plan.devices import Device, local_device
from finetune_trainer.plan.job import plan_job
from finetune_trainer.plan.records import JobPlan, PlanContext
from finetune_trainer.storage import Storage


def preflight(run: RunConfig, workers: Workers | None = None, *, device: Device | None = None) -> JobPlan:
    """Check a job against its machine, its model and its data, without training; returns its plan.

    Args:
        device: what each worker will have. Default: what this machine has, which then must have enough of it.

    Raises:
        UserError: one problem per fault.
    """
    workers = workers or plan_workers(run.job.spec.resources)
    problems = [*_storage(run), *([] if device else _resources(workers)), *_pipeline(run), *_cpu_limits(run, workers)]
    problems += [*_data(run), *_rewards(run), *_evaluations(run), *_syntheses(run)]
    plan: JobPlan | None = None
    try:
        plan = _model(run, workers, device or local_device(workers.most))
    except UserError as error:
        problems += [problem for problem in error.problems if not _is_told(problem, problems, run)]
    if problems or plan is None:
        raise UserError(list(dict.fromkeys(problems)))
    return plan


def _storage(run: RunConfig) -> Iterator[Problem]:
    """The nearest directory that exists must be writable; a remote store must not refuse (one that is away may come
    back, and is waited for)."""
    if "://" in run.root:
        yield from _refusal(run)
        return
    nearest = next(parent for parent in Path(run.root).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        yield Problem("storage.path", f"can't write to {nearest} ({error.strerror}): choose another directory")


def _refusal(run: RunConfig) -> Iterator[Problem]:
    try:
        Storage(run.root, patience=0).exists(RUN_CONFIG)
    except Exception as error:  # every store has errors of its own
        if not passing(error):
            yield Problem("storage.uri", f"can't reach {run.root}: {type(error).__name__}: {error}")


def _resources(workers: Workers) -> Iterator[Problem]:
    here = torch.cuda.device_count()
    if workers.accelerator and not os.environ.get("RAY_ADDRESS") and workers.least > here:
        yield Problem("resources.gpusPerNode", f"{workers.least} GPUs are asked for and this machine has {here}")


def _pipeline(run: RunConfig) -> Iterator[Problem]:
    """Orders of stages that can't work."""
    stages = run.job.spec.stages
    for index, stage in enumerate(stages):
        where = place(run, index)
        last = stage_before(run, index)
        before = None if last is None else stages[last]
        yield from _adapter_faults(run, stage, before, where)
        if before is not None and _is_masked(before) and not _is_masked(stage):
            yield Problem(where, "follows a masked language model, which can't generate: use objective causal there")


def _adapter_faults(run: RunConfig, stage: Stage, before: Stage | None, where: str) -> Iterator[Problem]:
    lora = getattr(stage.spec, "lora", None)
    untrained = run.job.spec.model.config is not None and (before is None or before.tokenizer is not None)
    if lora is not None and untrained:
        yield Problem(f"{where}.lora", "adapts a model that is built from scratch and never trained: pretrain it first")
    if isinstance(stage.spec, PromptSpec) and lora is None and untrained:
        yield Problem(where, "asks a model for answers that is built from scratch and never trained: pretrain it first")
    if stage.esft is not None and untrained:
        yield Problem(where, "trains some experts of a model that is built from scratch and never trained: pretrain it")
    carried = getattr(before.spec, "lora", None) if before is not None else None
    if stage.esft is not None and carried is not None and not carried.merge:
        yield Problem(where, f"starts from an adapter that is not merged: set lora.merge in {before.title}")
    goes_on = lora is not None and carried is not None and not carried.merge
    if goes_on and stage.reward is None:  # a reward stage merges what is carried on
        for name in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
            if getattr(lora, name) != getattr(carried, name):
                message = f"is {getattr(lora, name)!r}, but the adapter carried on from {before.title} has "
                field = type(lora).model_fields[name].alias
                message += f"{getattr(carried, name)!r}: set lora.merge there, or the same value here"
                yield Problem(f"{where}.lora.{field}", message)


def _cpu_limits(run: RunConfig, workers: Workers) -> Iterator[Problem]:
    """On CPUs, PEFT's DoRA loses the scales of an 8-bit layer at the first step (peft 0.21.2)."""
    for index, stage in enumerate([] if workers.accelerator else run.job.spec.stages):
        lora, quantization = (getattr(stage.spec, name, None) for name in ("lora", "quantization"))
        if lora is not None and lora.use_dora and quantization is not None and quantization.bits == 8:
            where = f"{place(run, index)}.lora.useDora"
            yield Problem(where, "DoRA on 8-bit weights needs a GPU: set quantization.bits to 4, or useDora to false")


def _data(run: RunConfig) -> Iterator[Problem]:
    base = Path(run.base_dir)
    for index, stage in enumerate(run.job.spec.stages):
        for field in DATA_FIELDS:
            data = getattr(stage.spec, field, None)
            if data is not None and all(source.stage is None for source in data.sources):
                alias = type(stage.spec).model_fields[field].alias
                referenced = isinstance(stage.spec, EvaluateSpec) and stage.spec.generates
                where = f"{place(run, index)}.{alias}"
                yield from inspect(data, stage.spec.row_kind, where, base, referenced=referenced)


def _evaluations(run: RunConfig) -> Iterator[Problem]:
    """Tasks that are not there, databases that can't be made, models that are compared and can't be."""
    masked = {stage.title for stage in run.job.spec.stages if _is_masked(stage)}
    for index, stage in enumerate(run.job.spec.stages):
        spec, where = stage.spec, place(run, index)
        if not isinstance(spec, EvaluateSpec):
            continue
        yield from task_problems(spec, where, run.base_dir)
        for at, name in enumerate(spec.compare_with):
            if name in masked:
                yield Problem(f"{where}.compareWith[{at}]", f"{name!r} fills masks: it has nothing to compare")
        try:
            if spec.database is not None:
                open_database(spec.database, f"{where}.database", Path(run.base_dir), Path(run.cache_dir)).close()
        except UserError as error:
            yield from error.problems


def _rewards(run: RunConfig) -> Iterator[Problem]:
    for index, stage in enumerate(run.job.spec.stages):
        if isinstance(stage.spec, PromptSpec):
            from finetune_trainer.rewards.problems import reward_problems  # an HTTP client: few jobs need one

            yield from reward_problems(stage.spec, run, place(run, index))


def _syntheses(run: RunConfig) -> Iterator[Problem]:
    """Teachers that can't be reached or loaded, databases and evaluation data that can't be read."""
    stages = run.job.spec.stages
    for index, stage in enumerate(stages):
        spec, where = stage.spec, place(run, index)
        if not isinstance(spec, SynthesizeSpec):
            continue
        from finetune_trainer.synthesis.checks import synthesis_problems  # an HTTP client: few jobs need one

        yield from synthesis_problems(spec, where, Path(run.base_dir))
        model, at = spec.teacher.model, f"{where}.teacher.model"
        if model is None:
            continue
        if model.path is not None and not local_path(model.path, run.base_dir).is_dir():
            yield Problem(f"{at}.path", f"no such directory: {model.path}")
        named = next((one for one in stages if model.stage is not None and one.title == model.stage), None)
        last = stage_before(run, index)
        before = named or (None if last is None else stages[last])
        current = not any((model.hub, model.path, model.uri, model.stage))
        if current and run.job.spec.model.config is not None and (before is None or before.tokenizer is not None):
            yield Problem(at, "is the job's model, which is built from scratch and not trained yet: it knows nothing")
        if before is not None and _is_masked(before) and (current or named is not None):
            yield Problem(at, f"{before.title!r} fills masks: a teacher continues text")


def _is_told(problem: Problem, told: list[Problem], run: RunConfig) -> bool:
    """Whether a stage that makes data has been found faulty in other words already."""
    stages = enumerate(run.job.spec.stages)
    paths = [place(run, index) for index, stage in stages if isinstance(stage.spec, SynthesizeSpec)]
    return any(problem.path.startswith(path) and any(one.path.startswith(path) for one in told) for path in paths)


def _model(run: RunConfig, workers: Workers, device: Device) -> JobPlan:
    """The model can be built, adapters find their modules, lengths fit its context, kernels are installed."""
    spec = run.job.spec.model
    missing = [problem for problem in _paths(run) if problem]
    kernel = "flash_attn" if spec.attn_implementation == "flash_attention_2" else "flash_attn_interface"
    if spec.attn_implementation.startswith("flash") and find_spec(kernel) is None:
        missing.append(Problem("model.attnImplementation", f"{spec.attn_implementation} needs the package {kernel}"))
    if missing:
        raise UserError(missing)
    return plan_job(run, PlanContext(device, workers.most))


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


def _is_masked(stage: Stage) -> bool:
    return isinstance(stage.spec, PretrainSpec) and stage.spec.objective == "masked"
