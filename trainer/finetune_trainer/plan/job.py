"""Plan a job: one record of plain values per stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from finetune_api.runconfig import RunConfig
from finetune_api.stages import SynthesizeSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.plan.devices import Device, peak_flops
from finetune_trainer.plan.records import JobPlan, PlanContext, Rows
from finetune_trainer.plan.stage import StagePlanner
from finetune_trainer.plan.teacher import plan_teacher
from finetune_trainer.stage_graph import directories, place
from finetune_trainer.storage.filesystem import Storage

if TYPE_CHECKING:
    from finetune_trainer.synthesis.estimate import SynthesisPlan


def plan_job(run: RunConfig, context: PlanContext, rows: Rows | None = None) -> JobPlan:
    """Return the plan of all stages of a job that train or run a model. No model is allocated.

    Args:
        rows: returns the size of a stage's data by reading and tokenizing it; without it, steps may be unknown.

    Raises:
        UserError: all problems together: a model cannot be built, an adapter matches no module, or sharding is invalid.
    """
    config = context.config or job_config(run)
    dtype = plan_dtype(run, context.device)
    stages, syntheses, teachers, problems = [], [], [], []
    for index, stage in enumerate(run.job.spec.stages):
        try:
            planner = StagePlanner(run, context, config, dtype, index, stage)
            if stage.synthesize is not None:
                asked = None if list(stage.sources_from_stages()) else _synthesis(run, index, stage.synthesize)
                syntheses.append(asked)
                teachers.append(plan_teacher(run, context, config, dtype, index, asked))
            elif stage.evaluate is not None:
                stages.append(planner.evaluation(stage.evaluate, rows))
            elif stage.tokenizer is None:
                stages.append(planner.plan(rows))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    name = str(dtype).removeprefix("torch.")
    peak = peak_flops(context.device.name, dtype)
    return JobPlan(run.job.metadata.name, context.device, context.workers, name, peak, tuple(stages),
                   tuple(filter(None, syntheses)), tuple(filter(None, teachers)))  # fmt: skip


def _synthesis(run: RunConfig, index: int, spec: SynthesizeSpec) -> SynthesisPlan:
    from finetune_trainer.synthesis.estimate import plan_synthesis  # imported here, as few jobs need it

    return plan_synthesis(spec, index, run.job.spec.stages[index].title, place(run, index), **directories(run))


def job_config(run: RunConfig) -> PretrainedConfig:
    """Return the configuration of the job's model, with the vocabulary size of its tokenizer.

    Raises:
        UserError: see `load_config`.
    """
    source = stage_source(run, 0, Storage(run.root))
    tokenizer = load_tokenizer(source) if source.config is not None and source.tokenizer else None
    config = load_config(source, tokenizer)
    trained = run.job.spec.stages[0].tokenizer
    if trained is not None and "vocab_size" not in (source.config or {}):
        config.vocab_size = trained.vocab_size
    return config


def plan_dtype(run: RunConfig, device: Device) -> torch.dtype:
    """Return the dtype that the job's `model.dtype` selects on a device, local or not."""
    named = run.job.spec.model.dtype
    if named != "auto":
        dtype = getattr(torch, named)
        assert isinstance(dtype, torch.dtype)
        return dtype
    known = peak_flops(device.name, torch.float32) is not None
    has_bfloat16 = not known or peak_flops(device.name, torch.bfloat16) is not None
    return torch.bfloat16 if device.kind == "cuda" and has_bfloat16 else torch.float32
