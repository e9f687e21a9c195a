"""The check, before a stage's first step, that its model keeps the documents of packed rows apart."""

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
    """Probe the real model and give it packed rows in the form that it needs; refuse the stage where there is none.

    The preflight probes a small model of the same structure. This is the model that trains, on its device, with its
    kernels: it costs a few forward passes over two short rows. Under ZeRO-3 every worker takes part.

    Args:
        collator: of the stage's rows. Its batches hold a mask of the padding once the model takes it.
    """

    say: Callable[[str], None] | None = None
    """Receives a line of text with the result."""

    def __init__(self, context: StageContext, collator: PackedCollator) -> None:
        self.context, self.collator = context, collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        started = time.monotonic()
        try:
            finding = Probe(model, packed_rows(self.context.spec), self.context.precision.compute, log_probs).find()
        except NotMeasurable as error:
            likeliest = forms(model)[0]
            self._apply(likeliest, model)
            self._tell(f"packing could not be checked: {error}. Documents are given apart by {_MEANS[likeliest]}")
            return
        if finding.form is None:
            raise UserError([packing_problem(self.context.where, model.config, finding)])
        self._apply(finding.form, model)
        means, seconds = _MEANS[finding.form], time.monotonic() - started
        self._tell(f"packed documents are kept apart by {means} (checked in {seconds:.1f} s)")

    def _apply(self, form: Form, model: Any) -> None:
        separate_documents(model, form)
        self.collator.padding_mask = True

    def _tell(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
