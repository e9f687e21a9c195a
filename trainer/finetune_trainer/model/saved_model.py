"""What a saved directory holds: a whole model, an adapter of PEFT's or one of experts; and what an adapter adapts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter_files import BASE, adapter_base, is_expert_adapter

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"


def is_result(directory: Path) -> bool:
    """Whether `directory` holds a saved model or an adapter, of PEFT or of experts."""
    return (directory / MODEL_CONFIG).is_file() or is_adapter(directory) or is_expert_adapter(directory)


def is_reward_model(directory: str | Path) -> bool:
    """Whether `directory` holds a model that scores texts and continues none."""
    path = Path(directory, MODEL_CONFIG)
    saved = json.loads(path.read_text(encoding="utf-8")).get("architectures") if path.is_file() else None
    return any(name.endswith("ForSequenceClassification") for name in saved or ())


def is_adapter(directory: str | Path | None) -> bool:
    """Whether `directory` holds an adapter (PEFT) and not a whole model."""
    return directory is not None and Path(directory, ADAPTER_CONFIG).is_file()


def base_of(name: str) -> str:
    """The model that an adapter (PEFT) adapts, wherever a moved job now has it; any other name as it is.

    Raises:
        UserError: the adapter names none, or it is gone.
    """
    if not is_adapter(name):
        return name
    recorded = json.loads(Path(name, ADAPTER_CONFIG).read_text(encoding="utf-8")).get(BASE)
    if not recorded:
        raise UserError(f"{name}: its {ADAPTER_CONFIG} names no base model")
    return find_base(Path(name), str(recorded))


def expert_base_of(name: str) -> str:
    """The model that an expert adapter belongs to, wherever a moved job now has it.

    Raises:
        UserError: the adapter names none, or it is gone.
    """
    return find_base(Path(name), adapter_base(name))


def root_of(name: str) -> str:
    """The whole model below any adapters: what has a configuration."""
    base = expert_base_of(name) if is_expert_adapter(name) else base_of(name)
    return name if base == name else root_of(base)


def find_base(adapter: Path, recorded: str) -> str:
    """The base model of `adapter`: as recorded, or, where a job's directory was moved, the same path beside it.

    A recorded path that is no directory is looked for relative to the adapter; an absolute one by its last parts
    (`stages/01-pretrain/result`) below each directory above the adapter. What is found nowhere may be a hub id and is
    returned as it is.

    Raises:
        UserError: an absolute path that is gone.
    """
    candidates = [Path(recorded), adapter / recorded, *_moved(adapter, Path(recorded))]
    found = next((path for path in candidates if is_result(path) and path != adapter), None)
    if found is not None:
        return str(found)
    if os.path.isabs(recorded):
        raise UserError(
            f"{adapter}: its base model {recorded!r} is gone; put it back, "
            f"or write its place into {BASE} of its configuration"
        )
    return recorded


def _moved(adapter: Path, recorded: Path) -> list[Path]:
    # A single last part such as `result` would fit too many directories.
    tails = [Path(*recorded.parts[start:]) for start in range(1, len(recorded.parts) - 1)]
    return [above / tail for tail in tails for above in adapter.parents]
