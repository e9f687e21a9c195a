"""Memory of stages that generate completions: concurrent sequences, KV cache, reward models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from finetune_api.runconfig import RunConfig
from finetune_api.stages import Judge, PromptSpec, Reward, Stage
from finetune_api.training import TrainingSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import load_config
from finetune_trainer.model.source import ModelSource, local_path
from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import ModelSize, meta_model
from finetune_trainer.plan.steps import rows_per_step
from finetune_trainer.plan.vllm import choose_engine, vllm_bytes
from finetune_trainer.plan.vllm_version import installed_vllm


def answered_length(spec: TrainingSpec, longest: int | None, context: int | None) -> int | None:
    """Return the tokens of the longest prompt with the longest completion, or None if no prompt length is known.

    Args:
        longest: tokens of the longest prompt, or None.
        context: context length of the model, or None.
    """
    prompts = [limit for limit in (spec.row_limit, longest) if limit]
    if not prompts:
        return None
    return min([min(prompts) + spec.answer_length, *([context] if context else [])])


def answering(
    size: ModelSize, load: Workload, spec: PromptSpec, run: RunConfig, index: int, config: PretrainedConfig
) -> tuple[Workload, list[str]]:
    """Return the workload with generation and reward models added, and notes about them.

    Raises:
        UserError: the installed version of vLLM is not supported.
    """
    scorers, notes = 0, list[str]()
    for reward in spec.scorers.values():
        parameters, note = _scorer(reward, run, config)
        scorers, notes = scorers + parameters, notes + note
    drawn = spec.per_device_train_batch_size * spec.answers_per_prompt
    load, notes = (
        replace(load, drawn=drawn, scorers=scorers),
        [*_counts(run.job.spec.stages[index], load.workers), *notes],
    )
    if run.job.spec.stages[index].rlhf is None:
        return load, notes
    engine = choose_engine(run, index, load.kind, installed_vllm())
    notes = [*notes, engine.why] if load.kind == "cuda" else notes
    return replace(load, engine=vllm_bytes(size, load)) if engine.vllm else load, notes


def _counts(stage: Stage, workers: int) -> Iterator[str]:
    if (spec := stage.rlhf) is not None:
        steps = "step" if spec.num_iterations == 1 else f"{spec.num_iterations} steps"
        drawn = rows_per_step(spec, workers) * spec.num_generations
        yield f"draws {drawn:,} answers of at most {spec.answer_length} tokens for each {steps}"
    if (online := stage.online) is not None:
        most = f"of at most {online.answer_length} tokens"
        yield f"draws {online.num_generations} answers {most} to each prompt in each of {online.rounds} rounds"


def _scorer(reward: Reward | Judge, run: RunConfig, config: PretrainedConfig) -> tuple[int, list[str]]:
    """Return the number of parameters of a reward model, and a note if it is unknown."""
    if reward.stage is not None:
        return _parameters(config), []
    if reward.model is None:
        return 0, []
    path = local_path(reward.model, run.base_dir)
    if not path.is_dir():
        return 0, [f"the reward model {reward.model} is not here: its memory is not counted"]
    try:
        return _parameters(load_config(ModelSource(str(path), None, None, ""), None)), []
    except UserError:
        return 0, []  # preflight reports it


def _parameters(config: PretrainedConfig) -> int:
    return sum(weight.numel() for weight in meta_model(config, "reward").parameters())
