"""Checks before the first step of a stage that its model keeps the documents of packed rows apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.data import PackedCollator
from finetune_trainer.errors import UserError
from finetune_trainer.model.document_masks import Form, forms, separate_documents
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.packing_probe import NotMeasurable, Probe, log_probs, packed_rows, packing_problem

_MEANS = {
    Form.POSITIONS: "positions",
    Form.MASKS: "positions and attention masks",
    Form.BOUNDS: "their bounds, without an attention mask of the row",
}


class PackingCheck(TrainerCallback):
    """Probes the model and passes packed rows in the form that it needs; fails the stage if there is none.

    The preflight probes a small model of the same architecture. This callback probes the model that trains, on its
    device, with its kernels: a few forward passes over two short rows. Under ZeRO-3 every worker takes part.

    Args:
        context: the stage.
        collator: collator of the stage's rows. Its batches contain a padding mask once the form is known.
    """

    say: Callable[[str], None] | None = None
    """Receives a log line with the result."""

    def __init__(self, context: StageContext, collator: PackedCollator) -> None:
        self.context, self.collator = context, collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        started = time.monotonic()
        try:
            finding = Probe(model, packed_rows(self.context.spec), self.context.precision.compute, log_probs).find()
        except NotMeasurable as error:
            default = forms(model)[0]
            self._apply(default, model)
            self._log(f"packing could not be checked: {error}. Documents are kept apart by {_MEANS[default]}")
            return
        if finding.form is None:
            raise UserError([packing_problem(self.context.where, model.config, finding)])
        self._apply(finding.form, model)
        means, seconds = _MEANS[finding.form], time.monotonic() - started
        self._log(f"packed documents are kept apart by {means} (checked in {seconds:.1f} s)")

    def _apply(self, form: Form, model: Any) -> None:
        separate_documents(model, form)
        self.collator.padding_mask = True

    def _log(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
