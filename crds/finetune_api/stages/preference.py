"""Stages on pairs of a preferred and a rejected answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules
from finetune_api.declaration import Produces, RowKind, Task
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
        "lossWeights needs one value for each loss type",
    ),
]


class PreferenceLoss(ApiModel):
    """The loss of direct preference optimisation."""

    beta: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Strength of the pull towards the reference model."""
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
    """TRL's loss types; several are added up by `lossWeights`."""
    loss_weights: Annotated[list[LossWeight], Field(min_length=1, max_length=8)] | None = None
    """Weight of each loss type. Default: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round."""

    def loss_faults(self) -> Iterator[str]:
        """The Python twins of `LOSS_RULES`."""
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            yield "lossType exo_pair needs labelSmoothing > 0"
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield f"lossWeights has {len(self.loss_weights)} values for {len(self.loss_type)} loss types"


class PairSpec(AdapterSpec):
    """Training on pairs of a chosen and a rejected answer."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest prompt with answer, in tokens. Default: the model's context."""
    overflow: Literal["auto", "error", "truncate", "drop"] = "auto"
    """What happens to a longer pair: `error` refuses the job, `truncate` cuts its end, `drop` leaves it out.
    `auto`: `truncate` where `maxLength` is set, else `error`."""

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
    """Direct preference optimisation on pairs of a chosen and a rejected answer."""

    model_config = rules(
        STREAMING_RULE,
        QUANTIZED_LORA_RULE,
        cel(
            "self.reference != 'adapterDisabled' || has(self.lora)",
            "reference adapterDisabled needs lora: without adapters there is none to disable",
        ),
        cel(
            "self.reference != 'precomputed' || !self.data.streaming",
            "reference precomputed needs data that is not streaming",
        ),
        *LOSS_RULES,
    )

    reference: Literal["auto", "adapterDisabled", "model", "precomputed"] = "auto"
    """Where the reference's log-probabilities come from: the same model without its adapter, a second model, or one
    pass before training. `auto`: `adapterDisabled` with `lora`, else `model`."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.reference == "adapterDisabled" and self.lora is None:
            yield "reference adapterDisabled needs lora: without adapters there is none to disable"
        if self.reference == "precomputed" and self.data.streaming:
            yield "reference precomputed needs data that is not streaming"
        yield from self.loss_faults()

    @property
    def holds_reference(self) -> bool:
        return self.reference == "model" or (self.reference == "auto" and self.lora is None)

    @property
    def extra_forwards(self) -> int:
        return 0 if self.reference == "precomputed" else 1


class RewardSpec(PairSpec):
    """A reward model: scores answers so that chosen ones score above rejected ones (Bradley-Terry)."""

    model_config = rules(
        STREAMING_RULE,
        QUANTIZED_LORA_RULE,
        cel("!has(self.lora) || self.lora.merge", "no stage trains on a reward model's adapter: leave lora.merge true"),
    )

    center_rewards_coefficient: Annotated[float, Field(ge=0, le=100)] | None = None
    """Pulls the mean of a pair's two rewards towards 0 (arXiv 2312.09244); 0.01 is usual. Default: no pull."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-4
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.lora is not None and not self.lora.merge:
            yield "no stage trains on a reward model's adapter: leave lora.merge true"

    @property
    def produces(self) -> Produces:
        return "rewardModel"

    @property
    def task(self) -> Task:
        return "reward"

    @property
    def holds_reference(self) -> bool:
        return False

    @property
    def extra_forwards(self) -> int:
        return 0
