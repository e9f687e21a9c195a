"""Read an expert adapter's configuration. This module imports no slow libraries, since every model lookup uses it."""

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
    """Return whether a directory holds an expert adapter and not a whole model."""
    return directory is not None and Path(directory, ADAPTER_WEIGHTS).is_file()


def read_adapter_config(directory: str | Path) -> ExpertConfig:
    """Return the experts and other modules that an adapter's stage trained.

    Raises:
        UserError: its `expert_config.json` is missing or invalid.
    """
    path = Path(directory, EXPERT_CONFIG)
    try:
        return config_from(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise UserError([Problem(str(path), f"can't be read: {error}")]) from error


def adapter_base(directory: str | Path) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        UserError: it names none.
    """
    base = read_adapter_config(directory).notes.get(BASE)
    if not isinstance(base, str) or not base:
        raise UserError([Problem(str(Path(directory, EXPERT_CONFIG)), f"names no base model ({BASE})")])
    return base
