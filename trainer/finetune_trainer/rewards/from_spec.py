"""Load the rewards of a job."""

from __future__ import annotations

from collections import Counter

import torch

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import Reward
from finetune_trainer.errors import UserError
from finetune_trainer.model.source import resolve_model, stage_result
from finetune_trainer.rewards.combined import NamedReward
from finetune_trainer.rewards.functions import ExactMatch, PatternMatch, RewardFunction, load_function
from finetune_trainer.rewards.reward_models import load_reward_model
from finetune_trainer.stage_graph import stage_named
from finetune_trainer.storage.filesystem import Storage


def load_rewards(
    rewards: list[Reward], run: RunConfig, where: str, dtype: torch.dtype, device: torch.device
) -> list[NamedReward]:
    """Return the loaded rewards, with reward models in `dtype` on `device`.

    Args:
        where: the path of the list, such as `stages[2].rlhf.rewards`.

    Raises:
        UserError: a model or function does not exist.
    """
    seen: Counter[str] = Counter()
    found = []
    for index, reward in enumerate(rewards):
        path = f"{where}[{index}]"
        function, name = _load(reward, run, path, dtype, device)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}_{seen[name]}"
        found.append(NamedReward(unique, function, reward.weight, path))
    return found


def _load(
    reward: Reward, run: RunConfig, where: str, dtype: torch.dtype, device: torch.device
) -> tuple[RewardFunction, str]:
    if reward.exact_match is not None:
        return ExactMatch(reward.exact_match), "exact_match"
    if reward.regex is not None:
        return PatternMatch(reward.regex), "regex"
    if reward.function is not None:
        return import_function(reward.function, run.base_dir, f"{where}.function"), reward.function.partition(":")[2]
    if reward.stage is not None:
        directory = stage_result(run, Storage(run.root), stage_named(run, reward.stage))
        return load_reward_model(directory, reward.stage, dtype, device, f"{where}.stage"), reward.stage
    assert reward.model is not None
    path = resolve_model(reward.model, run)
    return load_reward_model(path, "model", dtype, device, f"{where}.model"), "model"


def import_function(path: str, base_dir: str, where: str) -> RewardFunction:
    """Return a function as `load_function` does.

    Raises:
        UserError: it can't be imported.
    """
    try:
        return load_function(path, base_dir)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError([Problem(where, f"{path}: {error}")]) from error
    except Exception as error:  # a user's module may raise anything
        raise UserError([Problem(where, f"{path} can't be imported: {type(error).__name__}: {error}")]) from error
