"""The task of a stage's model, and the auto class of transformers for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from finetune_api.declaration import Task as Task
from finetune_trainer.model.composite import AutoLanguageModel, AutoScoringModel

SCORE = "score"
"""Attribute of a reward model's head in transformers' causal families."""

_CLASSES: dict[Task, Any] = {
    "causal": AutoLanguageModel,
    "masked": AutoModelForMaskedLM,
    "reward": AutoScoringModel,
}


def auto_class(task: Task) -> Any:
    """Return the auto class that builds and loads a model for a task."""
    return _CLASSES[task]


def score_head(model: PreTrainedModel) -> nn.Module | None:
    """Return a reward model's head; None for other models."""
    return getattr(model, SCORE, None)


def as_reward(config: PretrainedConfig, pad_token_id: int | None) -> PretrainedConfig:
    """Change a configuration to output one score, at the last token that is not padding; return it."""
    config.num_labels = 1
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    return config
