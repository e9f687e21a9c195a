"""Recognize saved models, PEFT adapters and expert adapters, and find the base model of an adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter_files import BASE, adapter_base, is_expert_adapter

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"


def is_result(directory: Path) -> bool:
    """Return whether `directory` holds a saved model, a PEFT adapter or an expert adapter."""
    return (directory / MODEL_CONFIG).is_file() or is_adapter(directory) or is_expert_adapter(directory)


def is_reward_model(directory: str | Path) -> bool:
    """Return whether `directory` holds a model for sequence classification."""
    path = Path(directory, MODEL_CONFIG)
    saved = json.loads(path.read_text(encoding="utf-8")).get("architectures") if path.is_file() else None
    return any(name.endswith("ForSequenceClassification") for name in saved or ())


def is_adapter(directory: str | Path | None) -> bool:
    """Return whether `directory` holds a PEFT adapter and not a whole model."""
    return directory is not None and Path(directory, ADAPTER_CONFIG).is_file()


def base_of(name: str) -> str:
    """Return the base model of a PEFT adapter, also after its job's directory was moved; return other names unchanged.

    Raises:
        UserError: the adapter names no base model, or its base model does not exist.
    """
    if not is_adapter(name):
        return name
    recorded = json.loads(Path(name, ADAPTER_CONFIG).read_text(encoding="utf-8")).get(BASE)
    if not recorded:
        raise UserError(f"{name}: its {ADAPTER_CONFIG} names no base model")
    return find_base(Path(name), str(recorded))


def expert_base_of(name: str) -> str:
    """Return the base model of an expert adapter, also after its job's directory was moved.

    Raises:
        UserError: the adapter names no base model, or its base model does not exist.
    """
    return find_base(Path(name), adapter_base(name))


def root_of(name: str) -> str:
    """Return the whole model below any adapters."""
    base = expert_base_of(name) if is_expert_adapter(name) else base_of(name)
    return name if base == name else root_of(base)


def find_base(adapter: Path, recorded: str) -> str:
    """Return the base model of `adapter`: the recorded path, or its new path if the job's directory was moved.

    A recorded path that does not exist is tried relative to the adapter, and by its last parts
    (`stages/01-pretrain/result`) below each parent directory of the adapter. A relative path that is not found may be a
    hub id and is returned unchanged.

    Raises:
        UserError: an absolute path does not exist.
    """
    candidates = [Path(recorded), adapter / recorded, *_moved(adapter, Path(recorded))]
    found = next((path for path in candidates if is_result(path) and path != adapter), None)
    if found is not None:
        return str(found)
    if os.path.isabs(recorded):
        raise UserError(
            f"{adapter}: its base model {recorded!r} does not exist; restore it, "
            f"or set {BASE} in the adapter's configuration to its path"
        )
    return recorded


def _moved(adapter: Path, recorded: Path) -> list[Path]:
    # A single last part such as `result` would match too many directories.
    tails = [Path(*recorded.parts[start:]) for start in range(1, len(recorded.parts) - 1)]
    return [above / tail for tail in tails for above in adapter.parents]
