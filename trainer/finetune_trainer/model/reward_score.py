"""Read a reward model's score at the last token of a text, the end-of-text token included.

transformers reads it at the last token that is not `config.pad_token_id`. Where texts end with that token (many
tokenizers use their EOS token as padding), this is the token before, and the EOS position is never trained. So here the
attention mask defines the last token, and a result gets a padding token that no text contains: plain transformers then
reads the same position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from finetune_trainer.model.task import SCORE, score_head

PAD = "<|pad|>"
_SPARE = ("pad", "reserved", "unused", "extra_id", "placeholder", "dummy")
"""Parts of the names of special tokens that texts do not contain, in order of preference."""
_PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
_RARE_TEXT = "\u0378\U0001f9a9\ua66e\x01"
"""Text that a tokenizer with byte fallback encodes without unknown tokens."""
_PASSED_ON = ("position_ids", "inputs_embeds", "use_cache")


def read_at_last_token(model: PreTrainedModel) -> None:
    """Make a model read its score at the last token of the attention mask, for any padding token and side.

    Do nothing for families that read it elsewhere (BERT: at the first token).
    """
    if score_head(model) is None or model.base_model is model:
        return
    model.forward = MethodType(functools.wraps(type(model).forward)(_score), model)


def _score(
    model: PreTrainedModel, input_ids: Any = None, attention_mask: Any = None, **more: Any
) -> SequenceClassifierOutputWithPast:
    """Return scores [B, 1]: the head's output at each row's last token in the mask."""
    options = {name: more[name] for name in _PASSED_ON if more.get(name) is not None}
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    last = torch.full_like(rows, -1)
    if attention_mask is not None:
        last = (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(-1)
    return SequenceClassifierOutputWithPast(logits=getattr(model, SCORE)(hidden[rows, last.to(rows.device)]))


def set_distinct_pad_token(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Set a padding token that no text contains, if possible.

    It is an existing special token, or a new one where the embeddings have an unused row.

    Args:
        rows: number of rows of the model's embeddings.
    """
    if score_pad(tokenizer) is not None:
        return
    spare = next(_spare_tokens(tokenizer, rows), None)
    if spare is not None:
        tokenizer.pad_token = spare
    elif len(tokenizer) < rows and PAD not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"pad_token": PAD})


def score_pad(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the padding token's id for a reward model's configuration; None where texts contain that token.

    Without one, transformers scores one text at a time, at its last token, and refuses batches.
    """
    pad = tokenizer.pad_token_id
    return None if pad is None or int(pad) in special_ids_in_texts(tokenizer) else int(pad)


def set_score_pad(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set `pad_token_id` to `score_pad`, so that plain transformers reads the score at the last token."""
    config.get_text_config().pad_token_id = score_pad(tokenizer)


def special_ids_in_texts(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids of special tokens that texts contain: begin and end of text, and the chat template's tokens."""
    named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "sep", "cls", "mask")}
    text = ""
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(_PROBE, tokenize=False))
    return {one for one in named if one is not None} | set(tokenizer(text)["input_ids"])


def _spare_tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[str]:
    written = special_ids_in_texts(tokenizer)
    special = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number < rows and number not in written
    }
    for part in _SPARE:
        yield from (name for name in special.values() if part in name.lower())
    unknown = tokenizer.unk_token_id
    if unknown in special and unknown not in tokenizer(_RARE_TEXT, add_special_tokens=False)["input_ids"]:
        yield special[unknown]
