"""Read the experts that a job selects by hand (`expertConfig`) and check them against its model."""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.stages import EsftSpec
from finetune_trainer.errors import UserError
from finetune_trainer.esft.selection import (
    ExpertConfig,
    config_from,
    config_problems,
    read_config,
    read_scores,
    score_problems,
    select_layers,
)
from finetune_trainer.model.source import local_path


def load_expert_config(spec: EsftSpec, where: str, base_dir: str, sizes: Mapping[int, int]) -> ExpertConfig:
    """Return the experts of a stage's `expertConfig`.

    Args:
        where: the stage's path in the job, such as `stages[1].esft`.
        sizes: experts by layer of the model.

    Raises:
        UserError: they can't be read, or don't fit the model.
    """
    expert_config, path = spec.expert_config, f"{where}.expertConfig"
    assert expert_config is not None
    if expert_config.file is not None:
        path = f"{path}.file"
        config = read_config(local_path(expert_config.file, base_dir), path)
    elif expert_config.scores is not None:
        path = f"{path}.scores"
        scores = read_scores(local_path(expert_config.scores, base_dir), spec.score, path)
        if problems := score_problems(scores, sizes, path):
            raise UserError(problems)
        config = ExpertConfig(select_layers(scores, spec.top_p))
    else:
        path = f"{path}.experts"
        config = config_from({"experts": dict(expert_config.experts or {})}, path)
    config = ExpertConfig(
        {layer: ids for layer, ids in config.experts.items() if ids},
        config.shared_experts or spec.train_shared_experts,
        config.non_expert_modules or spec.train_non_experts,
        {"given": True}
        if expert_config.scores is None
        else {"given": True, "score": spec.score, "threshold": spec.top_p},
    )
    if problems := config_problems(config, sizes, path):
        raise UserError(problems)
    return config
