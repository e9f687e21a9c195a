"""Explain why models and tokenizers with custom Python code (`auto_map`) are refused: that code is never run.

Every library call passes `trust_remote_code=False`; without it transformers would ask on standard input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer_config.json"


def custom_code_fault(name: str, file: str, revision: str | None = None) -> str | None:
    """Return a message if a model's `config.json` or a tokenizer's configuration names custom code, or None.

    Call this after transformers has refused to read the file: transformers then has no class for it.
    """
    auto_map = _read(name, file, revision).get("auto_map")
    if not auto_map:
        return None
    named = ", ".join(f"{auto}: {_target_names(target)}" for auto, target in _pairs(auto_map))
    what = "an architecture" if file == CONFIG_FILE else "a tokenizer class (such as PreTrainedTokenizerFast)"
    return (
        f"its {file} names Python code of its own (auto_map: {named}), which is never run: convert it to {what} that "
        "transformers supports, or choose a converted version"
    )


def _read(name: str, file: str, revision: str | None) -> dict[str, Any]:
    try:
        path = cached_file(name, file, revision=revision, local_files_only=True)
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _pairs(auto_map: Any) -> list[tuple[str, Any]]:
    """Return (auto class, target) pairs; old tokenizers have a list and no mapping."""
    return list(auto_map.items()) if isinstance(auto_map, dict) else [("AutoTokenizer", auto_map)]


def _target_names(target: Any) -> str:
    return " or ".join(str(one) for one in target if one) if isinstance(target, (list, tuple)) else str(target)
