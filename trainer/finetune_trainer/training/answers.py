"""Answers of the model in training to the prompts of prepared rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trl.models import unwrap_model_for_generation

from finetune_api.stages import Sampling
from finetune_trainer.generation.batches import Completion, generate_batch
from finetune_trainer.generation.options import GenerationOptions

SEEDS = 1 << 32
"""Seeds of one stage: its own seed's multiples of this, and a number for each occasion."""


@dataclass(frozen=True)
class PromptRow:
    """One prepared row."""

    ids: list[int]
    """The prompt's tokens."""
    prompt: Any
    """A string or a list of messages."""
    columns: dict[str, Any]
    """What reward functions may ask for."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the prompt offers."""

    @property
    def fields(self) -> dict[str, Any]:
        """What reward functions get of the row: its columns, and its tools as the column `tools`."""
        return {**self.columns, "tools": self.tools} if self.tools else self.columns

    def completion(self, text: str) -> Any:
        """An answer in the form of the prompt: a string, or a list of one message."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


def prompt_row(row: dict[str, Any]) -> PromptRow:
    """A row as `data.prepare` leaves it."""
    return PromptRow(list(row["prompt_ids"]), **json.loads(row["row"]))


def options_of(sampling: Sampling) -> GenerationOptions:
    """What a job's sampling is to generation."""
    return GenerationOptions(do_sample=True, **sampling.model_dump())


def draw(
    trainer: Any,
    prompts: list[list[int]],
    keys: list[int],
    seed: int,
    options: GenerationOptions,
    samples: int,
    at: int,
) -> list[Completion]:
    """`samples` answers to each prompt, one prompt after the other; every worker calls it with as many prompts.

    An answer depends on the model, the seed, its prompt's key and its number alone. Under ZeRO-3 the weights are
    gathered once for all of them.

    Args:
        at: prompts answered at a time.
    """
    found: list[Completion] = []
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        for start in range(0, len(prompts), at):
            part = slice(start, start + at)
            tokenizer = trainer.processing_class
            found += generate_batch(model, tokenizer, prompts[part], options, seed, keys=keys[part], samples=samples)
    return found
