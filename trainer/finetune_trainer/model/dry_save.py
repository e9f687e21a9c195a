"""Save a model's files besides its weights to a temporary directory, to find errors before the first checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from finetune_trainer.model.generation import generation_fault, repair_generation


def saving_faults(
    config: PretrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """Yield why a model's configuration, its repaired generation configuration or its tokenizer can't be saved."""
    config, generation = deepcopy(config), deepcopy(generation)
    repair_generation(generation)
    if fault := generation_fault(generation):
        yield f"its generation_config.json can't be saved once a stage changes it: {fault}; correct the file"
        return
    parts: dict[str, tuple[Any, str]] = {
        "configuration": (config, "config.json"),
        "generation configuration": (generation, "generation_config.json"),
        "tokenizer": (tokenizer, "the tokenizer's files"),
    }
    for name, (part, files) in parts.items():
        if part is not None and (fault := _fault(part.save_pretrained)):
            yield f"its {name} can't be saved: {fault}; correct {files}"


def _fault(save: Callable[[Path], object]) -> str | None:
    with tempfile.TemporaryDirectory(prefix="finetune-") as directory:
        try:
            save(Path(directory, "saved"))
        except Exception as error:  # families and tokenizers raise errors of many types
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
