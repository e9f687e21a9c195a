"""What the files of an expert adapter say without their tensors. Light to import: whoever finds a model asks it."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.esft.selection import ExpertConfig, config_from
from finetune_trainer.layout import EXPERT_CONFIG

ADAPTER_WEIGHTS = "expert_adapter.safetensors"
BASE = "base_model_name_or_path"


def is_expert_adapter(directory: str | Path | None) -> bool:
    """Whether a directory holds trained experts and not a whole model."""
    return directory is not None and Path(directory, ADAPTER_WEIGHTS).is_file()


def read_adapter_config(directory: str | Path) -> ExpertConfig:
    """What an adapter trained.

    Raises:
        UserError: its `expert_config.json` is missing or broken.
    """
    path = Path(directory, EXPERT_CONFIG)
    try:
        return config_from(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise UserError([Problem(str(path), f"can't be read: {error}")]) from error


def adapter_base(directory: str | Path) -> str:
    """The model that an adapter belongs to, as recorded.

    Raises:
        UserError: none is recorded.
    """
    base = read_adapter_config(directory).notes.get(BASE)
    if not isinstance(base, str) or not base:
        raise UserError([Problem(str(Path(directory, EXPERT_CONFIG)), f"names no base model ({BASE})")])
    return base
