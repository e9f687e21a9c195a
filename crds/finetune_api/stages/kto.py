"""Preference tuning on single answers that are labelled good or bad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import cel, rules
from finetune_api.declaration import RowKind
from finetune_api.stages.preference import PairSpec
from finetune_api.training import QUANTIZED_LORA_RULE, STREAMING_RULE, PositiveInt

BATCH_FAULT = (
    "lossType kto pairs each prompt with the answer of another row of its forward pass: set perDeviceTrainBatchSize to "
    "2 or more"
)
Weight = Annotated[float, Field(ge=0, le=1000)]


class KtoSpec(PairSpec):
    """Kahneman-Tversky optimization: preference tuning on single answers that are labelled good or bad."""

    model_config = rules(
        STREAMING_RULE,
        QUANTIZED_LORA_RULE,
        cel("self.lossType != 'kto' || self.perDeviceTrainBatchSize > 1", BATCH_FAULT),
    )

    overflow: Literal["auto", "error", "truncate", "drop"] = "auto"
    """What to do with a longer row. `error`: refuse the job. `truncate`: cut its end. `drop`: remove it. `auto`:
    `truncate` if `maxLength` is set, else `error`."""
    per_device_train_batch_size: PositiveInt = 8
    """Batch size per worker and forward pass. `lossType: kto` needs at least 2."""
    beta: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Strength of the pull towards the reference model."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """TRL's loss type. `kto` (arXiv 2402.01306) measures rewards from an estimate of the KL to the reference;
    `apo_zero_unpaired` (arXiv 2408.06266) has no such estimate."""
    desirable_weight: Weight = 1.0
    """Weight of the loss of good answers."""
    undesirable_weight: Weight = 1.0
    """Weight of the loss of bad answers."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.loss_type == "kto" and self.per_device_train_batch_size < 2:
            yield BATCH_FAULT

    @property
    def row_kind(self) -> RowKind:
        return "unpaired"

    @property
    def sequences_per_row(self) -> int:
        return 1

    @property
    def holds_reference(self) -> bool:
        return self.lora is None

    @property
    def extra_forwards(self) -> int:
        """One of the reference; `kto` adds one of each model over prompts with answers of other rows, for the KL."""
        return 3 if self.loss_type == "kto" else 1
