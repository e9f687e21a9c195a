"""Answers to prompts: all at once in batches, or one as a stream of text."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.generation.load import Loaded
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import Prompt, encode, stop_ids


def generate(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    options: GenerationOptions | None = None,
    *,
    raw: bool = False,
    batch_size: int = 16,
) -> list[str]:
    """One answer per prompt, in order, without special tokens.

    Prompts are padded on the left in batches of `batch_size`. A text is a user's message where the tokenizer has a
    chat template and is continued as it stands where it has none, or with `raw`. A batch stops at the model's context,
    measured by its longest prompt.

    Raises:
        UserError: a masked model, an empty prompt, one that fills the whole context, or a conversation without a chat
            template; all of them at once.
    """
    options = options or GenerationOptions()
    encoded = _checked(loaded, prompts, options, raw)
    _seed(options)
    batches = (encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size))
    return [answer for batch in batches for answer in _answers(loaded, batch, options, raw)]


def stream(
    loaded: Loaded, prompt: Prompt, options: GenerationOptions | None = None, *, raw: bool = False
) -> Iterator[str]:
    """Pieces of one answer as they come; with beam search, which knows its answer only at the end, one piece.

    Closing the iterator stops the model after the token it is at. Errors are `generate`'s, raised at the first piece.
    """
    options = options or GenerationOptions()
    encoded = _checked(loaded, [prompt], options, raw)
    _seed(options)
    if options.num_beams > 1:
        yield from _answers(loaded, encoded, options, raw)
        return
    yield from _streamed(loaded, encoded, options, raw)


class _Stop(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """One boolean per row, shape (batch,)."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _streamed(loaded: Loaded, encoded: list[list[int]], options: GenerationOptions, raw: bool) -> Iterator[str]:
    # transformers' stubs narrow the tokenizer to one class; any tokenizer decodes.
    tokenizer: Any = loaded.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([_Stop(stop)])
            _generate(loaded, encoded, options, raw, streamer=streamer, stopping_criteria=criteria)
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


def _answers(loaded: Loaded, encoded: list[list[int]], options: GenerationOptions, raw: bool) -> list[str]:
    output = _generate(loaded, encoded, options, raw)
    start = max(map(len, encoded))
    return list(loaded.tokenizer.batch_decode(output[:, start:], skip_special_tokens=True))


def _generate(
    loaded: Loaded, encoded: list[list[int]], options: GenerationOptions, raw: bool, **extra: Any
) -> torch.Tensor:
    """Prompt and answer ids, shape (batch, longest prompt + longest answer)."""
    batch = loaded.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt")
    config = _config(loaded, options, raw, longest=max(map(len, encoded)))
    ids, mask = batch["input_ids"].to(loaded.model.device), batch["attention_mask"].to(loaded.model.device)
    # peft's and transformers' stubs disagree about what `generate` is.
    model: Any = loaded.model
    with torch.inference_mode():
        output: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **extra)
    return output


def _config(loaded: Loaded, options: GenerationOptions, raw: bool, longest: int) -> GenerationConfig:
    own = loaded.model.generation_config
    stops = stop_ids(loaded.tokenizer, own.eos_token_id if own is not None else None, raw)
    context = _context(loaded)
    room = options.max_new_tokens if context is None else min(options.max_new_tokens, context - longest)
    pad = loaded.tokenizer.pad_token_id
    return options.config(stop_ids=stops, pad_id=0 if pad is None else int(pad), max_new_tokens=room)


def _checked(loaded: Loaded, prompts: Sequence[Prompt], options: GenerationOptions, raw: bool) -> list[list[int]]:
    if loaded.kind != "causal":
        raise UserError("this model fills masks and does not continue text: use fill")
    encoded = encode(loaded.tokenizer, prompts, options.system, raw)
    context = _context(loaded)
    problems = [
        Problem(f"prompts[{index}]", f"{len(ids)} tokens leave no room for an answer in a context of {context}")
        for index, ids in enumerate(encoded)
        if context is not None and len(ids) >= context
    ]
    if problems:
        raise UserError(problems)
    return encoded


def _context(loaded: Loaded) -> int | None:
    value = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _seed(options: GenerationOptions) -> None:
    if options.seed is not None:
        torch.manual_seed(options.seed)
