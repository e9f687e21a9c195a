"""Options of text generation, validated before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from transformers import GenerationConfig

from finetune_api.generation import Generation
from finetune_api.problems import Problem
from finetune_trainer.errors import UserError

SAMPLING_FIELDS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class GenerationOptions:
    """Generation options, named as in transformers' `GenerationConfig`; greedy decoding by default.

    The model's `generation_config.json` does not override them.

    Raises:
        UserError: lists every field that is out of range or conflicts with another.
    """

    max_new_tokens: int = 256
    """Maximum number of tokens of one answer; fewer if the model's context ends."""
    do_sample: bool = False
    """Sample each token by its probability; false takes the most likely one."""
    temperature: float | None = None
    """Divides the logits before sampling: below 1 less random, above 1 more random. None: 1."""
    top_p: float | None = None
    """Sample from the most likely tokens whose probabilities sum to this (arXiv 1904.09751). None: all."""
    top_k: int | None = None
    """Sample from this number of most likely tokens. None: all."""
    num_beams: int = 1
    """Number of beams of beam search; 1 disables it."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that occurred (arXiv 1909.05858); 1 disables it."""
    seed: int | None = None
    """Seed of sampling: the same seed, prompts and options give the same answers. None: a random seed."""
    system: str | None = None
    """System message that is prepended to each conversation without one."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, in addition to the end-of-text and end-of-turn tokens. The answer does not include
    them."""

    @classmethod
    def of(cls, generation: Generation) -> Self:
        """Return the options of a job."""
        values = generation.model_dump()
        return cls(**values | {"stop": tuple(generation.stop)})

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_conflicts(self)]
        if problems:
            raise UserError(problems)

    def config(self, *, stop_ids: list[int], pad_id: int, max_new_tokens: int) -> GenerationConfig:
        """Return the options as GenerationConfig, with an explicit value for every field that a model may override.

        `generation.sampling` does the sampling, so decoding in transformers is always greedy or beam search.
        """
        return GenerationConfig(  # type: ignore[no-untyped-call]  # transformers has no types for it
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,  # transformers' default: greedy decoding warns about any other value
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            stop_strings=list(self.stop) or None,
            eos_token_id=stop_ids,
            pad_token_id=pad_id,
            use_cache=True,
        )


def _range_problems(options: GenerationOptions) -> Iterator[Problem]:
    checks = [
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", _positive(options.temperature), "more than 0 (leave it and do_sample out for greedy decoding)"),
        ("top_p", options.top_p is None or 0 < options.top_p <= 1, "more than 0 and at most 1"),
        ("top_k", options.top_k is None or options.top_k >= 1, "at least 1 (leave it out to sample among all tokens)"),
        ("num_beams", options.num_beams >= 1, "at least 1"),
        ("repetition_penalty", options.repetition_penalty > 0, "more than 0 (1 is no penalty)"),
        ("seed", options.seed is None or 0 <= options.seed < 2**63, "0 to 2^63 - 1"),
    ]
    for name, valid, expected in checks:
        if not valid:
            yield Problem(name, f"got {getattr(options, name)}, expected {expected}")


def _conflicts(options: GenerationOptions) -> Iterator[Problem]:
    if options.do_sample and options.num_beams > 1:
        yield Problem("num_beams", f"got {options.num_beams} with do_sample: choose beam search or sampling")
    if options.do_sample:
        return
    for name in SAMPLING_FIELDS:
        if getattr(options, name) is not None:
            yield Problem(name, f"got {getattr(options, name)} without do_sample: only sampling uses it")


def _positive(value: float | None) -> bool:
    return value is None or value > 0
