"""Check the rewards of a job before training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import Judge, PromptSpec, Reward
from finetune_trainer.data.checks import column_problems
from finetune_trainer.endpoint.client import ChatClient
from finetune_trainer.errors import UserError
from finetune_trainer.model.saved_model import is_adapter, is_result, is_reward_model
from finetune_trainer.model.source import local_path
from finetune_trainer.rewards.from_spec import import_function


def reward_problems(spec: PromptSpec, run: RunConfig, where: str) -> Iterator[Problem]:
    """Yield problems: functions that can't be imported, invalid patterns, missing columns and models.

    Args:
        where: the stage's path, such as `stages[2].rlhf`.
    """
    for place, scorer in spec.scorers.items():
        yield from _judge_problems(scorer, run, f"{where}.{place}")
        if isinstance(scorer, Reward):
            yield from _reward_problems(scorer, spec, run, where, f"{where}.{place}")


def _reward_problems(reward: Reward, spec: PromptSpec, run: RunConfig, stage: str, where: str) -> Iterator[Problem]:
    if reward.regex is not None:
        try:
            re.compile(reward.regex)
        except re.error as error:
            yield Problem(f"{where}.regex", f"{reward.regex!r} is not a regular expression: {error}")
    if reward.exact_match is not None:
        yield from column_problems(spec, reward.exact_match, f"{where}.exactMatch", stage, Path(run.base_dir))


def _judge_problems(reward: Reward | Judge, run: RunConfig, where: str) -> Iterator[Problem]:
    if isinstance(reward, Judge) and reward.endpoint is not None:
        try:
            ChatClient(reward.endpoint, f"{where}.endpoint")
        except UserError as error:
            yield from error.problems
    if reward.function is not None:
        try:
            import_function(reward.function, run.base_dir, f"{where}.function")
        except UserError as error:
            yield from error.problems
    if reward.model is not None:
        yield from model_problems(reward.model, run, f"{where}.model")


def model_problems(name: str, run: RunConfig, where: str) -> Iterator[Problem]:
    """Yield problems of a local reward model; a remote one is checked when it is downloaded."""
    if "://" in name:
        return
    path = local_path(name, run.base_dir)
    if not path.is_dir():
        if name.count("/") > 1 or name.startswith((".", "/")):
            yield Problem(where, f"no such directory: {name} (looked in {run.base_dir} and the current directory)")
    elif is_adapter(path) or not is_result(path):
        yield Problem(where, f"{name} holds no whole model: expected the result of a reward stage")
    elif not is_reward_model(path):
        yield Problem(where, f"{name} holds a model without a score head: expected the result of a reward stage")
