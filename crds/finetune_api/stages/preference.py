"""Stages on preference pairs: DPO and reward models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules
from finetune_api.declaration import Produces, RowKind, Task, WithoutReference
from finetune_api.training import (
    QUANTIZED_LORA_RULE,
    STREAMING_RULE,
    AdapterSpec,
    resolve_overflow,
)

LossWeight = Annotated[float, Field(ge=0, le=1000)]


LOSS_RULES: list[Json] = [
    cel("!('exo_pair' in self.lossType) || self.labelSmoothing > 0.0", "lossType exo_pair needs labelSmoothing > 0"),
    cel(
        "!has(self.lossWeights) || self.lossWeights.size() == self.lossType.size()",
        "lossWeights needs one value per loss type",
    ),
]


class PreferenceLoss(ApiModel):
    """Loss settings of direct preference optimization."""

    beta: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Coefficient of the KL penalty. A higher value keeps the model closer to the reference model."""
    loss_type: Annotated[
        list[
            Literal[
                "sigmoid",
                "hinge",
                "ipo",
                "exo_pair",
                "nca_pair",
                "robust",
                "bco_pair",
                "sppo_hard",
                "aot",
                "aot_unpaired",
                "apo_zero",
                "apo_down",
                "discopop",
                "sft",
                "sigmoid_norm",
            ]
        ],
        Field(min_length=1, max_length=8),
    ] = Field(default=["sigmoid"])
    """Loss types of TRL. Several are summed with `lossWeights`."""
    loss_weights: Annotated[list[LossWeight], Field(min_length=1, max_length=8)] | None = None
    """Weight of each loss type. Default: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed fraction of pairs whose chosen and rejected answers are swapped."""

    def loss_faults(self) -> Iterator[str]:
        """Yield the violations of `LOSS_RULES`, checked in Python."""
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            yield "lossType exo_pair needs labelSmoothing > 0"
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield f"lossWeights has {len(self.loss_weights)} values for {len(self.loss_type)} loss types"


class PairSpec(AdapterSpec):
    """Training on preference pairs: a chosen and a rejected answer to the same prompt."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Maximum length of prompt and answer in tokens. Default: the context length of the model."""
    overflow: Literal["auto", "error", "truncate", "drop"] = "auto"
    """What to do with a longer pair. `error`: refuse the job. `truncate`: cut its end. `drop`: remove it. `auto`:
    `truncate` if `maxLength` is set, else `error`."""

    @property
    def row_kind(self) -> RowKind:
        return "preference"

    @property
    def row_limit(self) -> int | None:
        return self.max_length

    @property
    def row_overflow(self) -> str:
        return resolve_overflow(self.overflow, self.max_length)

    @property
    def sequences_per_row(self) -> int:
        return 2

    @property
    def token_loss(self) -> bool:
        return False


class DpoSpec(PairSpec, PreferenceLoss):
    """Direct preference optimization (DPO) on preference pairs."""

    model_config = rules(
        STREAMING_RULE,
        QUANTIZED_LORA_RULE,
        cel(
            "self.reference != 'adapterDisabled' || has(self.lora)",
            "reference adapterDisabled needs lora: there is no adapter to disable",
        ),
        cel(
            "self.reference != 'precomputed' || !self.data.streaming",
            "reference precomputed excludes data.streaming",
        ),
        *LOSS_RULES,
    )

    reference: Literal["auto", "adapterDisabled", "model", "precomputed"] = "auto"
    """How the log-probabilities of the reference model are computed. `adapterDisabled`: with the policy, its adapter
    disabled. `model`: with a second copy of the model. `precomputed`: in one pass before training. `auto`:
    `adapterDisabled` with `lora`, else `model`."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.reference == "adapterDisabled" and self.lora is None:
            yield "reference adapterDisabled needs lora: there is no adapter to disable"
        if self.reference == "precomputed" and self.data.streaming:
            yield "reference precomputed excludes data.streaming"
        yield from self.loss_faults()

    @property
    def holds_reference(self) -> bool:
        return self.reference == "model" or (self.reference == "auto" and self.lora is None)

    @property
    def extra_forwards(self) -> int:
        return 0 if self.reference == "precomputed" else 1


class RewardSpec(WithoutReference, PairSpec):
    """Train a reward model that scores chosen answers above rejected ones (Bradley-Terry loss)."""

    model_config = rules(
        STREAMING_RULE,
        QUANTIZED_LORA_RULE,
        cel("!has(self.lora) || self.lora.merge", "lora.merge must be true: the adapter of a reward model is not kept"),
    )

    center_rewards_coefficient: Annotated[float, Field(ge=0, le=100)] | None = None
    """Coefficient of a loss term that pulls the mean reward of a pair towards 0 (arXiv 2312.09244). A usual value is
    0.01. Default: no such term."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.lora is not None and not self.lora.merge:
            yield "lora.merge must be true: the adapter of a reward model is not kept"

    @property
    def produces(self) -> Produces:
        return "rewardModel"

    @property
    def task(self) -> Task:
        return "reward"
