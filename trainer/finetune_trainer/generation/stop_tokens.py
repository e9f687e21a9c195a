"""Write the stop tokens of a saved model to `generation_config.json`.

`generate`, pipelines and vLLM stop at the tokens in this file. They ignore the chat template, so without these
a model that was trained on conversations would generate beyond the end of its turn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from finetune_trainer.generation.prompts import stop_ids

Settings = dict[str, Any]


def write_stops(directory: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings | None = None) -> None:
    """Add the stop tokens and the padding token to the directory's `generation_config.json`.

    A directory without that file contains a model that does not generate text, and is not changed. The file is edited
    as JSON, because transformers refuses to save some files that other versions of it have written.

    Args:
        settings: contents of a new file if there is none, because an adapter is saved without one.
    """
    path = directory / GENERATION_CONFIG_NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if known is None:
        return
    stops = stop_ids(tokenizer, known.get("eos_token_id"))
    added: Settings = {"eos_token_id": stops} if stops else {}
    if tokenizer.pad_token_id is not None:
        added["pad_token_id"] = tokenizer.pad_token_id
    path.write_text(json.dumps(known | added, indent=2) + "\n", encoding="utf-8")


def unstopped(base: str, revision: str | None, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the stop tokens of a saved adapter that its base does not stop at.

    transformers uses the generation config of the base, not that of the adapter.
    """
    try:
        own: Any = GenerationConfig.from_pretrained(base, revision=revision or "main")
    except OSError:  # without the file, transformers reads the model's configuration
        own = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False).get_text_config()
    wanted = GenerationConfig.from_pretrained(adapter).eos_token_id
    missing = set(_listed(wanted)) - set(_listed(getattr(own, "eos_token_id", None)))
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(missing)]


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
