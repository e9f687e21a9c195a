"""Stages on plain text: a tokenizer, and language modelling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.data import DataSpec
from finetune_api.declaration import Produces, RowKind, StageDeclaration, Task
from finetune_api.training import PositiveInt, TrainingSpec

SpecialToken = Annotated[str, Field(min_length=1, max_length=64)]


class TokenizerSpec(StageDeclaration):
    """A byte-level BPE tokenizer trained from a corpus, with a chat template that marks assistant tokens."""

    data: DataSpec
    """Corpus. A share of it (`validationSplit`, 0.05 where that is 0) measures bytes per token."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 32000
    """Tokens in the vocabulary, special tokens included."""
    min_frequency: PositiveInt = 2
    """How often a pair must occur to be merged."""
    special_tokens: Annotated[list[SpecialToken], Field(max_length=256)] = Field(default=[])
    """Special tokens beside the built-in ones (end of text, start and end of a turn, mask, padding)."""
    model_max_length: PositiveInt | None = None
    """Longest input in tokens, saved with the tokenizer. Default: the model's context."""

    @property
    def trains(self) -> bool:
        """It is made in the driver, by no worker."""
        return False

    @property
    def produces(self) -> Produces:
        return "tokenizer"

    @property
    def row_kind(self) -> RowKind:
        return "text"


class PretrainSpec(TrainingSpec):
    """Language modelling on plain text, from scratch or continued."""

    objective: Literal["causal", "masked"] = "causal"
    """`causal`: predict the next token, in packed blocks. `masked`: predict hidden tokens (BERT), of which 80% are
    replaced by the mask token, 10% by a random one and 10% kept."""
    block_size: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Tokens per training row; documents are joined and cut into rows of this length."""
    mlm_probability: Annotated[float, Field(ge=0.01, le=0.9)] = 0.15
    """Share of the tokens hidden by `objective: masked`."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay; norms and biases have none."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay rate of the second moment."""

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

    @property
    def sequences_per_row(self) -> int:
        return 1

    @property
    def holds_reference(self) -> bool:
        return False

    @property
    def extra_forwards(self) -> int:
        return 0

    @property
    def token_loss(self) -> bool:
        return True
