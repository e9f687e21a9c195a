"""What stages need that draw answers: sequences at a time, a cache of keys and values, reward models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transformers import PretrainedConfig

from finetune_api.runconfig import RunConfig
from finetune_api.stages import Judge, OnlineSpec, PromptSpec, Reward, RlhfSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import load_config
from finetune_trainer.model.source import ModelSource, local_path
from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import ModelSize, meta_model
from finetune_trainer.plan.vllm import choose_engine, vllm_bytes
from finetune_trainer.plan.vllm_version import installed_vllm


def answers_per_prompt(spec: PromptSpec) -> int:
    """Answers drawn to each prompt."""
    return spec.num_generations if isinstance(spec, (RlhfSpec, OnlineSpec)) else 1


def trained_per_prompt(spec: PromptSpec) -> int:
    """Answers to each prompt that are trained on: all of them, or the best and the worst."""
    return 2 if isinstance(spec, OnlineSpec) else answers_per_prompt(spec)


def answered_length(spec: PromptSpec, longest: int | None, context: int | None) -> int | None:
    """Return the tokens of the longest prompt with the longest answer, or None where no prompt's length is known.

    Args:
        longest: tokens of the longest prompt, or None.
        context: of the model, or None.
    """
    prompts = [limit for limit in (spec.max_prompt_length, longest) if limit]
    if not prompts:
        return None
    return min([min(prompts) + spec.generation.max_new_tokens, *([context] if context else [])])


def answering(
    size: ModelSize, load: Workload, spec: PromptSpec, run: RunConfig, index: int, config: PretrainedConfig
) -> tuple[Workload, list[str]]:
    """Return the work with what drawing and scoring answers adds, and notes on what that is.

    Raises:
        UserError: vLLM is installed in a version that does not fit.
    """
    scorers, notes = 0, list[str]()
    for reward in _rewards(spec):
        parameters, note = _scorer(reward, run, config)
        scorers, notes = scorers + parameters, notes + note
    drawn = spec.per_device_train_batch_size * answers_per_prompt(spec)
    load, notes = replace(load, drawn=drawn, scorers=scorers), [*_counts(spec, load.workers), *notes]
    if not isinstance(spec, RlhfSpec):
        return load, notes
    engine = choose_engine(run, index, load.kind, installed_vllm())
    notes = [*notes, engine.why] if load.kind == "cuda" else notes
    return replace(load, engine=vllm_bytes(size, load)) if engine.vllm else load, notes


def _rewards(spec: PromptSpec) -> list[Reward | Judge]:
    if isinstance(spec, OnlineSpec):
        return [spec.judge]
    return list(spec.rewards) if isinstance(spec, RlhfSpec) else []


def _counts(spec: PromptSpec, workers: int) -> Iterator[str]:
    prompts = spec.per_device_train_batch_size * spec.gradient_accumulation_steps * workers
    if isinstance(spec, RlhfSpec):
        steps = "step" if spec.num_iterations == 1 else f"{spec.num_iterations} steps"
        drawn = prompts * spec.num_generations
        yield f"draws {drawn:,} answers of at most {spec.generation.max_new_tokens} tokens for each {steps}"
    if isinstance(spec, OnlineSpec):
        most = f"of at most {spec.generation.max_new_tokens} tokens"
        yield f"draws {spec.num_generations} answers {most} to each prompt in each of {spec.rounds} rounds"


def _scorer(reward: Reward | Judge, run: RunConfig, config: PretrainedConfig) -> tuple[int, list[str]]:
    """Parameters of a reward model, and why they are not known."""
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
        return 0, []  # preflight tells


def _parameters(config: PretrainedConfig) -> int:
    return sum(weight.numel() for weight in meta_model(config, "reward").parameters())
