"""The trained stages: one small module each, found by the member field that a job sets.

A new stage is a spec in `finetune_api.stages`, a module here with a `make_trainer`, and a line in `TRAINERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_trainer.stages import dpo, pretrain, sft
from finetune_trainer.training.context import StageContext

TRAINERS: dict[str, Callable[[StageContext], Any]] = {
    "pretrain": pretrain.make_trainer,
    "sft": sft.make_trainer,
    "dpo": dpo.make_trainer,
}
