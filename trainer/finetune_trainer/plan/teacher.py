"""Plan the teacher model of a `synthesize` stage on the job's own workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import SynthesizeSpec, TeacherModel
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import context_length, load_config
from finetune_trainer.model.source import ModelSource, local_path
from finetune_trainer.plan.inference import Reading, inference_memory, smaller_batch
from finetune_trainer.plan.model_size import ModelSize, meta_model, model_size
from finetune_trainer.plan.records import PlanContext, TeacherPlan
from finetune_trainer.plan.sharding_choice import HEADROOM
from finetune_trainer.stage_graph import place

if TYPE_CHECKING:
    from finetune_trainer.synthesis.estimate import SynthesisPlan

LONGEST = 2
"""Assumed ratio of a teacher's longest prompt to its mean prompt."""


def plan_teacher(
    run: RunConfig,
    context: PlanContext,
    job_model: PretrainedConfig,
    dtype: torch.dtype,
    index: int,
    asked: SynthesisPlan | None,
) -> TeacherPlan | None:
    """Return the plan of a local teacher, or None if the teacher is an endpoint or a model in remote storage.

    Args:
        job_model: configuration of the job's model, which the results of earlier stages share.
        asked: estimated requests to the teacher, or None if unknown.

    Raises:
        UserError: the configuration of the teacher's model cannot be read.
    """
    spec = run.job.spec.stages[index].synthesize
    assert spec is not None
    given = spec.teacher.model
    if given is None or given.uri is not None:
        return None
    path = f"{place(run, index)}.teacher.model"
    config = _config(given, run, path) or job_model
    size, length = model_size(meta_model(config)), _length(spec, config, asked)
    load = Reading(given.per_device_batch_size, length, _dtype(config, dtype).itemsize, context.device.kind,
                   scores_texts=False, generates=True)  # fmt: skip
    memory, limit = inference_memory(size, load), round(HEADROOM * context.device.memory_bytes)
    fits = memory.total <= limit
    return TeacherPlan(index, size.total, length, memory, limit - memory.total, () if fits else
                       (_advice(size, load, path, limit),))  # fmt: skip


def _config(given: TeacherModel, run: RunConfig, path: str) -> PretrainedConfig | None:
    """Return the configuration of the teacher's own model, or None if the teacher is the job's model."""
    if given.hub is None and given.path is None:
        return None
    name = given.hub or str(local_path(str(given.path), run.base_dir))
    try:
        return load_config(ModelSource(name, None, given.revision, ""), None)
    except UserError as error:
        field = "hub" if given.hub else "path"
        raise UserError([Problem(f"{path}.{field}", problem.message) for problem in error.problems]) from error


def _dtype(config: PretrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a teacher is saved and therefore loaded in, else `dtype`."""
    saved = getattr(config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else dtype


def _length(spec: SynthesizeSpec, config: PretrainedConfig, asked: SynthesisPlan | None) -> int:
    """Return the tokens of a long prompt with its completion, or the model's context length if prompts are unknown."""
    context, answer = context_length(config), spec.teacher.generation.max_new_tokens
    if asked is None or not asked.calls:
        return context or 1024 + answer
    wanted = LONGEST * asked.prompt_tokens // asked.calls + answer
    return min(wanted, context or wanted)


def _advice(size: ModelSize, load: Reading, path: str, limit: int) -> str:
    if (fitting := smaller_batch(size, load, limit)) is not None:
        return f"{path}.perDeviceBatchSize: {fitting}"
    return "each worker holds the whole teacher: use a smaller one, a larger device, or teacher.endpoint"
