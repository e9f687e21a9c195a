"""The declaration of a stage: the facts that data, plan, preflight, launch and report need from its spec."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from finetune_api.base import ApiModel

Task = Literal["causal", "masked", "reward"]
"""Causal language modeling, masked language modeling, or scoring of texts with one number."""
Produces = Literal["model", "tokenizer", "rewardModel", "data", "nothing"]
"""What a stage provides to later stages: the next one starts from its `model` or uses its `tokenizer`."""
RowKind = str
"""The kind of rows that a stage reads: the name of a module of `finetune_trainer.data.row_kinds`."""
Updates = Literal["nothing", "weights", "adapter", "experts"]
"""What a stage trains: every weight, a low-rank adapter, or experts of a mixture-of-experts model."""
PaddingSide = Literal["left", "right"]


class StageDeclaration(ApiModel):
    """The facts that every spec declares about its stage.

    Members without a safe default are abstract: a spec that does not declare one cannot be created.
    """

    @property
    @abstractmethod
    def row_kind(self) -> RowKind:
        """The kind of rows that the stage reads."""

    @property
    @abstractmethod
    def trains(self) -> bool:
        """Whether the stage runs optimizer steps."""

    @property
    @abstractmethod
    def produces(self) -> Produces:
        """What the stage provides to later stages."""

    @property
    def produces_model(self) -> bool:
        """Whether the next stage starts from the result of this stage, not from the model before it."""
        return self.produces in ("model", "tokenizer")

    @property
    def task(self) -> Task:
        """The task of the stage's model."""
        return "causal"

    @property
    def generates(self) -> bool:
        """Whether the stage generates completions."""
        return False

    @property
    def updates(self) -> Updates:
        """What the stage trains."""
        return "nothing"


class TrainingDeclaration(StageDeclaration):
    """The facts that the spec of a training stage declares in addition."""

    @property
    def trains(self) -> bool:
        return True

    @property
    def produces(self) -> Produces:
        return "model"

    @property
    def updates(self) -> Updates:
        return "weights"

    @property
    def merges(self) -> bool:
        """Whether the trained part is merged into its base at the end."""
        return False

    @property
    @abstractmethod
    def row_limit(self) -> int | None:
        """Maximum number of tokens of a row, without a generated answer. None: the model's context is the limit."""

    @property
    @abstractmethod
    def row_overflow(self) -> str:
        """How a longer row is handled, with `auto` resolved: `error`, `truncate`, `drop` or `split`."""

    @property
    @abstractmethod
    def sequences_per_row(self) -> int:
        """Number of sequences that are trained on per row: 2 for a pair."""

    @property
    @abstractmethod
    def holds_reference(self) -> bool:
        """Whether a worker holds a second model as the reference."""

    @property
    @abstractmethod
    def extra_forwards(self) -> int:
        """Number of forward passes without gradients per trained token, such as that of the reference model."""

    @property
    @abstractmethod
    def token_loss(self) -> bool:
        """Whether the loss is a mean over tokens, so that its value has a known scale."""

    @property
    def packs(self) -> bool:
        """Whether a row contains several examples, between which the model must mask attention."""
        return False

    @property
    def fills_rows(self) -> bool:
        """Whether every row has exactly `row_limit` tokens."""
        return self.packs

    @property
    def answer_length(self) -> int:
        """Maximum number of tokens of the answer that the stage generates to a row, in addition to the row."""
        return 0

    @property
    def trained_share(self) -> float:
        """Share of a full row's tokens that have loss."""
        return 1.0

    @property
    def padding_side(self) -> PaddingSide:
        """The side on which sequences of a batch are padded."""
        return "right"


class WithoutReference(TrainingDeclaration):
    """The facts of a stage that computes with no reference model."""

    @property
    def holds_reference(self) -> bool:
        return False

    @property
    def extra_forwards(self) -> int:
        return 0


class LanguageModelLoss(WithoutReference):
    """The facts of a stage whose loss is that of a language model on each row."""

    @property
    def sequences_per_row(self) -> int:
        return 1

    @property
    def token_loss(self) -> bool:
        return True
