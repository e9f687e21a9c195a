"""What a model is asked for, and the class of transformers that answers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from finetune_api.declaration import Task as Task
from finetune_trainer.model.composite import AutoLanguageModel, AutoScoringModel

SCORE = "score"
"""The head of a reward model, as transformers names it in causal families."""

_CLASSES: dict[Task, Any] = {
    "causal": AutoLanguageModel,
    "masked": AutoModelForMaskedLM,
    "reward": AutoScoringModel,
}


def auto_class(task: Task) -> Any:
    """Return the auto class that builds and loads a model for a task: transformers' own, or one over it."""
    return _CLASSES[task]


def score_head(model: PreTrainedModel) -> nn.Module | None:
    """A reward model's head; None of other models."""
    return getattr(model, SCORE, None)


def as_reward(config: PretrainedConfig, pad_token_id: int | None) -> PretrainedConfig:
    """The configuration with one score as its output, read at the last token that is no padding; it is changed."""
    config.num_labels = 1
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    return config
