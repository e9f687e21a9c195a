"""Supervised fine-tuning on dialogues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import cel, rules
from finetune_api.declaration import LanguageModelLoss, RowKind
from finetune_api.training import (
    QUANTIZED_LORA_RULE,
    STREAMING_RULE,
    AdapterSpec,
    TrainingSpec,
    resolve_overflow,
)

Overflow = Literal["auto", "error", "truncate", "drop", "split"]
PACKING_RULE = cel("!self.packing || has(self.maxLength)", "packing needs maxLength: the length of a packed row")


class SupervisedSpec(LanguageModelLoss, TrainingSpec):
    """Training on dialogues. The loss covers the assistant tokens of every turn."""

    model_config = rules(STREAMING_RULE, PACKING_RULE)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Maximum length of an example in tokens. Default: the context length of the model."""
    overflow: Overflow = "auto"
    """What to do with a longer example. `error`: refuse the job. `truncate`: cut its end. `drop`: remove it. `split`:
    continue it in another row. `auto`: `truncate` if `maxLength` is set, else `error`."""
    packing: bool = False
    """Pack several examples into each row of `maxLength` tokens. Each example attends to itself only. Refused for
    models that cannot separate the examples of a row (docs/packing.md)."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.packing and self.max_length is None:
            yield "packing needs maxLength: the length of a packed row"

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


class SftSpec(AdapterSpec, SupervisedSpec):
    """Supervised fine-tuning. The loss covers the assistant tokens of every turn."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE, PACKING_RULE)
