"""Generate completions for a batch of prompts, with a loaded model or one in training, with adapters, or sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from finetune_trainer.generation.attention_kernels import without_cudnn_attention
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import Prompt, encode, stop_ids
from finetune_trainer.generation.sampling import SeededSampling, draws
from finetune_trainer.heartbeat import record_progress
from finetune_trainer.model.precision import autocast_mixed
from finetune_trainer.model.router_logits import no_router_logits


@dataclass(frozen=True)
class Completion:
    """One completion."""

    text: str
    """The text, without special tokens and without the stop string that ended it."""
    tokens: list[int]
    """The generated token ids, including the stop token."""
    prompt: list[int]
    """The token ids of the prompt."""
    finished: bool
    """Whether the completion ended with a stop token or stop string, before the maximum length."""


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]] | Sequence[Prompt],
    options: GenerationOptions,
    seed: int = 0,
    *,
    keys: Sequence[int] | None = None,
    samples: int = 1,
    raw: bool = False,
    **extra: Any,
) -> list[Completion]:
    """Generate `samples` completions per prompt in one batch padded on the left; return them grouped by prompt.

    The model is in evaluation mode during the call, and no global random state is used. Under ZeRO-3 every worker must
    call this equally often; their prompts may differ.

    Args:
        model: a causal language model of transformers or PEFT, or a DeepSpeed engine that wraps one.
        prompts: token ids, or texts and conversations for `generation.prompts.encode`.
        seed: seed of sampling. A sample depends only on the seed, its prompt's key and its index, so it is the same in
            every batch and on every worker (except for rounding in the model).
        keys: a unique integer of at least 0 for each prompt. Default: its index.
        raw: continue texts without the chat template.
        extra: passed to transformers' `generate`, such as a streamer.

    Raises:
        UserError: prompts that can't be encoded.
        ValueError: a prompt fills the model's context, or several samples are requested with greedy decoding.
    """
    if not prompts:
        return []
    if samples > 1 and not options.do_sample:
        raise ValueError(f"{samples} samples of a prompt without do_sample would all be the same")
    encoded = _token_ids(tokenizer, prompts, options, raw)
    rows = [ids for ids in encoded for _ in range(samples)]
    numbers = [(key, sample) for key in (range(len(encoded)) if keys is None else keys) for sample in range(samples)]
    output = _generate(model, tokenizer, rows, numbers, options, seed, extra)
    start = max(map(len, rows))
    stops = set(_stops(model, tokenizer))
    return [
        _completion(tokenizer, ids, answer, stops, options)
        for ids, answer in zip(rows, output[:, start:].tolist(), strict=True)
    ]


def context_of(model: Any) -> int | None:
    """Return the context length of the model, or None if its configuration does not set it."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    numbers: list[tuple[int, int]],
    options: GenerationOptions,
    seed: int,
    extra: dict[str, Any],
) -> torch.Tensor:
    """Return the ids of prompts and completions, shape (rows, longest prompt + longest completion)."""
    config = _config(model, tokenizer, options, longest=max(map(len, rows)))
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    processors = LogitsProcessorList([Beats()])
    if options.do_sample:
        processors.append(SeededSampling(options, draws(seed, numbers, cast(int, config.max_new_tokens))))
    with _answering(model), torch.no_grad():
        output: torch.Tensor = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            logits_processor=processors,
            **({"tokenizer": tokenizer} if options.stop else {}),
            **extra,
        )
    return output


def _config(
    model: Any, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions, longest: int
) -> GenerationConfig:
    context = context_of(model)
    room = options.max_new_tokens if context is None else min(options.max_new_tokens, context - longest)
    if room < 1:
        raise ValueError(f"a prompt of {longest} tokens leaves no room for an answer in a context of {context}")
    pad = tokenizer.pad_token_id
    stops = _stops(model, tokenizer)
    return options.config(stop_ids=stops, pad_id=0 if pad is None else int(pad), max_new_tokens=room)


def _stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(model, "generation_config", None)
    return stop_ids(tokenizer, None if own is None else own.eos_token_id)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]] | Sequence[Prompt],
    options: GenerationOptions,
    raw: bool,
) -> list[list[int]]:
    first = prompts[0]
    if isinstance(first, list) and first and isinstance(first[0], int):
        return cast(list[list[int]], list(prompts))
    return encode(tokenizer, cast(Sequence[Prompt], prompts), options.system, raw)


def _completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    answer: list[int],
    stops: set[int],
    options: GenerationOptions,
) -> Completion:
    end = next((at for at, token in enumerate(answer) if token in stops), None)
    tokens = answer if end is None else answer[: end + 1]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    cuts = [at for at in map(text.find, options.stop) if at >= 0]
    if cuts:
        # Finished rows are padded until all rows are finished, so everything after a stop string is dropped.
        text, tokens = text[: min(cuts)], _until_stop(tokenizer, tokens, options.stop)
    return Completion(text, tokens, prompt, finished=end is not None or bool(cuts))


def _until_stop(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: Sequence[str]) -> list[int]:
    """Return the smallest number of tokens whose text contains a stop string."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(tokens[:middle], skip_special_tokens=True)
        low, high = (low, middle) if any(one in text for one in stop) else (middle + 1, high)
    return tokens[:low]


class Beats(LogitsProcessor):
    """A logits processor that reports progress at each token and does not change the scores."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        record_progress()
        return scores


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Prepare the model for generation, and restore it afterwards.

    In the context, the model is in evaluation mode, without cuDNN attention and router logits, and with autocast to
    half precision if only some of its weights have it (a frozen base with trained modules).
    """
    training = model.training
    model.eval()
    try:
        with without_cudnn_attention(), no_router_logits(model), autocast_mixed(model):
            yield
    finally:
        model.train(training)
