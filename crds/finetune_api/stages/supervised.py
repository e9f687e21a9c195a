"""Stages on dialogues: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import cel, rules
from finetune_api.declaration import RowKind
from finetune_api.training import (
    QUANTIZED_LORA_RULE,
    STREAMING_RULE,
    AdapterSpec,
    TrainingSpec,
    resolve_overflow,
)

Overflow = Literal["auto", "error", "truncate", "drop", "split"]
PACKING_RULE = cel("!self.packing || has(self.maxLength)", "packing needs maxLength, the length of a packed row")


class SupervisedSpec(TrainingSpec):
    """Training on dialogues: the loss is on the assistant's tokens of every turn."""

    model_config = rules(STREAMING_RULE, PACKING_RULE)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest example in tokens. Default: the model's context."""
    overflow: Overflow = "auto"
    """What happens to a longer example: `error` refuses the job, `truncate` cuts its end, `drop` leaves it out,
    `split` goes on in a further row. `auto`: `truncate` where `maxLength` is set, else `error`."""
    packing: bool = False
    """Fill rows of `maxLength` with several examples, which the model keeps exactly apart. Refused for a model that
    would carry one example into the next (docs/packing.md)."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.packing and self.max_length is None:
            yield "packing needs maxLength, the length of a packed row"

    @property
    def row_kind(self) -> RowKind:
        return "sft"

    @property
    def row_limit(self) -> int | None:
        return self.max_length

    @property
    def row_overflow(self) -> str:
        return resolve_overflow(self.overflow, self.max_length)

    @property
    def packs(self) -> bool:
        return self.packing

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


class SftSpec(AdapterSpec, SupervisedSpec):
    """Supervised fine-tuning: the loss is on the assistant's tokens of every turn."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE, PACKING_RULE)
