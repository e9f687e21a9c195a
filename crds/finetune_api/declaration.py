"""The declaration of a stage: the facts that data, plan, preflight, launch and report need from its spec."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from finetune_api.base import ApiModel

Task = Literal["causal", "masked", "reward"]
"""Causal language modeling, masked language modeling, or scoring of texts with one number."""
Produces = Literal["model", "tokenizer", "rewardModel", "data", "nothing"]
"""What later stages can use of a stage. The next stage starts from its `model` or has its `tokenizer`."""
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
        """What later stages can use of this one."""

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
        """Most tokens of a row, without an answer that the stage generates. None: what the model's context allows."""

    @property
    @abstractmethod
    def row_overflow(self) -> str:
        """What happens to a longer row, `auto` resolved: `error`, `truncate`, `drop` or `split`."""

    @property
    @abstractmethod
    def sequences_per_row(self) -> int:
        """Sequences that are trained on for each row: 2 for a pair."""

    @property
    @abstractmethod
    def holds_reference(self) -> bool:
        """Whether a worker holds a second model as the reference."""

    @property
    @abstractmethod
    def extra_forwards(self) -> int:
        """Forward passes without gradients for each trained token, such as the reference's."""

    @property
    @abstractmethod
    def token_loss(self) -> bool:
        """Whether the loss is a mean over tokens, so that its level can be judged."""

    @property
    def packs(self) -> bool:
        """Whether a row holds several examples, which the model must keep apart."""
        return False

    @property
    def fills_rows(self) -> bool:
        """Whether every row has exactly `row_limit` tokens."""
        return self.packs

    @property
    def answer_length(self) -> int:
        """Most tokens of an answer that the stage generates to a row, behind the row's own."""
        return 0

    @property
    def trained_share(self) -> float:
        """Share of a full row's tokens that have loss."""
        return 1.0

    @property
    def padding_side(self) -> PaddingSide:
        """The side on which sequences of a batch are padded."""
        return "right"
