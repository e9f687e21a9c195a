"""The experts that a job gives by hand, read and checked against its model."""

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


def given_config(spec: EsftSpec, where: str, base_dir: str, sizes: Mapping[int, int]) -> ExpertConfig:
    """The experts of a stage's `expertConfig`.

    Args:
        where: the stage's place in the job, such as `stages[1].esft`.
        sizes: experts by layer of the model.

    Raises:
        UserError: they can't be read, or don't fit the model.
    """
    given, place = spec.expert_config, f"{where}.expertConfig"
    assert given is not None
    if given.file is not None:
        place = f"{place}.file"
        config = read_config(local_path(given.file, base_dir), place)
    elif given.scores is not None:
        place = f"{place}.scores"
        scores = read_scores(local_path(given.scores, base_dir), spec.score, place)
        if problems := score_problems(scores, sizes, place):
            raise UserError(problems)
        config = ExpertConfig(select_layers(scores, spec.top_p))
    else:
        place = f"{place}.experts"
        config = config_from({"experts": dict(given.experts or {})}, place)
    config = ExpertConfig(
        {layer: ids for layer, ids in config.experts.items() if ids},
        config.shared_experts or spec.train_shared_experts,
        config.non_expert_modules or spec.train_non_experts,
        {"given": True} if given.scores is None else {"given": True, "score": spec.score, "threshold": spec.top_p},
    )
    if problems := config_problems(config, sizes, place):
        raise UserError(problems)
    return config
