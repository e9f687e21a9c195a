"""Generates completions with the model in training for the prompts of prepared rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from trl.models import unwrap_model_for_generation

from finetune_api.stages import Sampling
from finetune_trainer.generation.batches import Completion, generate_batch
from finetune_trainer.generation.options import GenerationOptions

SEEDS = 1 << 32
"""A seed of a stage is the stage's own seed times this, plus a number for each use."""


@dataclass(frozen=True)
class PromptRow:
    """A prepared row with a prompt."""

    ids: list[int]
    """Token ids of the prompt."""
    prompt: Any
    """A string or a list of messages."""
    columns: dict[str, Any]
    """Further columns of the row, for reward functions."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools in the prompt."""

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of reward functions: the columns of the row, and its tools as the column `tools`."""
        return {**self.columns, "tools": self.tools} if self.tools else self.columns

    def completion(self, text: str) -> Any:
        """Return a completion in the format of the prompt: a string, or a list of one message."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


def prompt_row(row: dict[str, Any]) -> PromptRow:
    """Return the prompt row of a row that `data.prepare` has written."""
    return PromptRow(list(row["prompt_ids"]), **json.loads(row["row"]))


def sampling_options(sampling: Sampling) -> GenerationOptions:
    """Return the generation options of a job's sampling settings."""
    return GenerationOptions(do_sample=True, **sampling.model_dump())


def generate_completions(
    trainer: Any,
    prompts: list[list[int]],
    keys: list[int],
    seed: int,
    options: GenerationOptions,
    samples: int,
    at: int,
) -> list[Completion]:
    """Generate `samples` completions for each prompt. Every worker must call it with the same number of prompts.

    A completion depends only on the model, the seed, the key of its prompt and its number. Under ZeRO-3 the weights are
    gathered once for all completions.

    Args:
        trainer: the trainer of the model.
        prompts: token ids of each prompt.
        keys: a key of each prompt.
        seed: seed of the stage.
        options: generation options.
        samples: completions per prompt.
        at: prompts per batch.

    Returns:
        the completions, in order of the prompts.
    """
    completions: list[Completion] = []
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        for start in range(0, len(prompts), at):
            part = slice(start, start + at)
            tokenizer = trainer.processing_class
            completions += generate_batch(
                model, tokenizer, prompts[part], options, seed, keys=keys[part], samples=samples
            )
    return completions
