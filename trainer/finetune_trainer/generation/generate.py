"""Generate answers to prompts, in batches or as a stream of text."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.generation.batches import context_of, generate_batch
from finetune_trainer.generation.load import Loaded
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import Prompt, encode


def generate(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    options: GenerationOptions | None = None,
    *,
    raw: bool | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Return one answer per prompt, in order, without special tokens.

    Prompts are padded on the left in batches of `batch_size`. The longest prompt of a batch limits how many tokens fit
    in the model's context.

    Args:
        raw: true continues texts without the chat template; false makes each text a user message if there is a chat
            template; None uses the format of the training data, or the chat template if that is not known.

    Raises:
        UserError: a masked language model, an empty prompt, a prompt that fills the context, or a conversation without
            a chat template.
    """
    options = options or GenerationOptions()
    encoded = _checked(loaded, prompts, options, raw)
    seed = _seed(options)
    starts = range(0, len(encoded), batch_size)
    batches = (_answers(loaded, encoded[at : at + batch_size], options, seed, at) for at in starts)
    return [answer for batch in batches for answer in batch]


def stream(
    loaded: Loaded, prompt: Prompt, options: GenerationOptions | None = None, *, raw: bool | None = None
) -> Iterator[str]:
    """Yield the pieces of one answer as they are generated; with beam search, the complete answer as one piece.

    Closing the iterator stops generation after the current token. The first piece raises the errors of `generate`.
    """
    options = options or GenerationOptions()
    encoded = _checked(loaded, [prompt], options, raw)
    if options.num_beams > 1:
        yield from _answers(loaded, encoded, options, seed=0)
        return
    yield from _streamed(loaded, encoded, options)


class _Stop(StoppingCriteria):
    """A stopping criterion that ends generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return one boolean per row, shape (batch,)."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _streamed(loaded: Loaded, encoded: list[list[int]], options: GenerationOptions) -> Iterator[str]:
    # transformers' stubs narrow the tokenizer to one class; any tokenizer decodes.
    tokenizer: Any = loaded.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            extra: dict[str, Any] = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([_Stop(stop)])}
            generate_batch(loaded.model, tokenizer, encoded, options, _seed(options), **extra)
        except BaseException as error:
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _answers(
    loaded: Loaded, encoded: list[list[int]], options: GenerationOptions, seed: int, first: int = 0
) -> list[str]:
    """Generate the answers to one batch. `first` is the index of its first prompt."""
    keys = range(first, first + len(encoded))
    found = generate_batch(loaded.model, loaded.tokenizer, encoded, options, seed, keys=keys)
    return [completion.text for completion in found]


def _checked(
    loaded: Loaded, prompts: Sequence[Prompt], options: GenerationOptions, raw: bool | None
) -> list[list[int]]:
    if loaded.kind != "causal":
        raise UserError("this model fills masks and does not continue text: use fill")
    encoded = encode(loaded.tokenizer, prompts, options.system, raw, loaded.form)
    context = context_of(loaded.model)
    problems = [
        Problem(f"prompts[{index}]", f"{len(ids)} tokens leave no room for an answer in a context of {context}")
        for index, ids in enumerate(encoded)
        if context is not None and len(ids) >= context
    ]
    if problems:
        raise UserError(problems)
    return encoded


def _seed(options: GenerationOptions) -> int:
    return secrets.randbits(62) if options.seed is None else options.seed
