"""Stages on plain text: tokenizer training and language modeling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.data import DataSpec
from finetune_api.declaration import LanguageModelLoss, Produces, RowKind, StageDeclaration, Task
from finetune_api.training import PositiveInt, TrainingSpec

SpecialToken = Annotated[str, Field(min_length=1, max_length=64)]


class TokenizerSpec(StageDeclaration):
    """Train a byte-level BPE tokenizer on a corpus. Its chat template marks assistant tokens."""

    data: DataSpec
    """Corpus. A fraction of it (`validationSplit`, or 0.05 if that is 0) is held out to measure bytes per token."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 32000
    """Size of the vocabulary, including special tokens."""
    min_frequency: PositiveInt = 2
    """Minimum frequency of a pair of tokens to be merged."""
    special_tokens: Annotated[list[SpecialToken], Field(max_length=256)] = Field(default=[])
    """Special tokens in addition to the built-in ones (end of text, start and end of a turn, mask, padding)."""
    model_max_length: PositiveInt | None = None
    """Maximum input length in tokens, saved with the tokenizer. Default: the context length of the model."""

    @property
    def trains(self) -> bool:
        """Return False: the driver trains the tokenizer without workers."""
        return False

    @property
    def produces(self) -> Produces:
        return "tokenizer"

    @property
    def row_kind(self) -> RowKind:
        return "text"


class PretrainSpec(LanguageModelLoss, TrainingSpec):
    """Language modeling on plain text, from random weights or continued."""

    objective: Literal["causal", "masked"] = "causal"
    """`causal`: predict the next token, in packed blocks. `masked`: predict masked tokens (BERT); 80% of them are
    replaced by the mask token, 10% by a random token, and 10% are unchanged."""
    block_size: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Tokens per training row. Documents are concatenated and split into rows of this length."""
    mlm_probability: Annotated[float, Field(ge=0.01, le=0.9)] = 0.15
    """Fraction of the tokens that `objective: masked` predicts."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay. It does not apply to norms and biases."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of AdamW's second moment."""

    @property
    def row_kind(self) -> RowKind:
        return "text"

    @property
    def task(self) -> Task:
        return self.objective

    @property
    def row_limit(self) -> int:
        return self.block_size

    @property
    def row_overflow(self) -> str:
        return "split"

    @property
    def trained_share(self) -> float:
        return self.mlm_probability if self.objective == "masked" else 1.0

    @property
    def fills_rows(self) -> bool:
        return True
