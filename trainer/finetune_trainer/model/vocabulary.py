"""Check that a model's embeddings have a row for every token, and add rows where they lack some."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.model import ModelSpec

_NAMED = 3


def needed_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows that the tokenizer's ids need. Ids of added tokens may follow a gap."""
    return 1 + max(tokenizer.get_vocab().values())


def added_rows(spec: ModelSpec, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of rows to which a loaded model's embeddings are resized, or None if they are not."""
    needed, rows = needed_rows(tokenizer), config.get_text_config().vocab_size
    if spec.resize_embeddings == "never" or needed <= rows:
        return None
    return -(-needed // spec.pad_to_multiple_of) * spec.pad_to_multiple_of


def vocabulary_fault(spec: ModelSpec, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why the tokenizer does not fit the embeddings of a loaded model, or None."""
    rows = config.get_text_config().vocab_size
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not beyond or spec.resize_embeddings == "auto":
        return None
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:_NAMED])
    more = ", ..." if len(beyond) > _NAMED else ""
    return (
        f"the embeddings have {rows} rows, and the tokenizer's ids go up to {beyond[-1][0]}: {named}{more} have none; "
        "set model.resizeEmbeddings: auto to add rows, or name the model's own tokenizer"
    )


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Add rows to the input and output embeddings, near the mean of the old ones and equal on every worker.

    transformers draws them from a normal distribution around the mean with 1e-9 of the old rows' covariance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=True)
