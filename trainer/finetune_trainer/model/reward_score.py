"""Where a reward model's score is read: at the last token of a text, its end token included.

transformers reads it at the last token that is not `config.pad_token_id`. Where texts end with that token (many
tokenizers pad with their end token) this is the token before, and the end token's position is never trained. So here
the attention mask says which token is the last one, and a result gets a padding token that no text has: plain
transformers then reads the same position.
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
"""Parts of the names of special tokens that no text has, the best first."""
_PROBE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
_EXOTIC = "\u0378\U0001f9a9\ua66e\x01"
"""What a tokenizer that falls back on bytes has no unknown token in."""
_PASSED_ON = ("position_ids", "inputs_embeds", "use_cache")


def read_at_last_token(model: PreTrainedModel) -> None:
    """Make a model read its score by the attention mask, whatever token it is padded with, and on whichever side.

    Nothing for families that read it elsewhere (BERT: at the first token).
    """
    if score_head(model) is None or model.base_model is model:
        return
    model.forward = MethodType(functools.wraps(type(model).forward)(_score), model)  # type: ignore[method-assign]


def _score(
    model: PreTrainedModel, input_ids: Any = None, attention_mask: Any = None, **more: Any
) -> SequenceClassifierOutputWithPast:
    """Scores [B, 1]: the head on the hidden state of each row's last token that the mask keeps."""
    options = {name: more[name] for name in _PASSED_ON if more.get(name) is not None}
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    rows = torch.arange(len(hidden), device=hidden.device)
    last = torch.full_like(rows, -1)
    if attention_mask is not None:
        last = (attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(-1)
    return SequenceClassifierOutputWithPast(logits=getattr(model, SCORE)(hidden[rows, last.to(rows.device)]))


def pad_apart(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Give a tokenizer a padding token that no text has, if there is one: an existing special token, or a new one where
    the model has a row of its embeddings to spare.

    Args:
        rows: of the model's embeddings.
    """
    if score_pad(tokenizer) is not None:
        return
    spare = next(_spare_tokens(tokenizer, rows), None)
    if spare is not None:
        tokenizer.pad_token = spare
    elif len(tokenizer) < rows and PAD not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"pad_token": PAD})


def score_pad(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The padding token's id for a reward model's configuration; None where texts have that token.

    Without one, transformers scores one text at a time, at its last token, and refuses batches.
    """
    pad = tokenizer.pad_token_id
    return None if pad is None or int(pad) in written_ids(tokenizer) else int(pad)


def set_score_pad(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set a reward model's padding token to `score_pad`: plain transformers then reads the score at the last token."""
    config.get_text_config().pad_token_id = score_pad(tokenizer)


def written_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the special tokens that texts are written with: begin and end of text, and those of the chat template."""
    named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "sep", "cls", "mask")}
    text = ""
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(_PROBE, tokenize=False))
    return {one for one in named if one is not None} | set(tokenizer(text)["input_ids"])


def _spare_tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[str]:
    written = written_ids(tokenizer)
    special = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and number < rows and number not in written
    }
    for part in _SPARE:
        yield from (name for name in special.values() if part in name.lower())
    unknown = tokenizer.unk_token_id
    if unknown in special and unknown not in tokenizer(_EXOTIC, add_special_tokens=False)["input_ids"]:
        yield special[unknown]
