"""The models that an evaluation measures: the result of the preceding stages, and the models to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.train.torch
import torch

from finetune_api.runconfig import RunConfig
from finetune_api.stages import BASE, EvaluateSpec
from finetune_trainer.form import FORMS, Form, read_form
from finetune_trainer.model.adapter import attach_adapter
from finetune_trainer.model.load import load_model, on_device
from finetune_trainer.model.precision import model_dtype, precision
from finetune_trainer.model.saved_model import is_adapter
from finetune_trainer.model.source import ModelSource, base_source, named_source, stage_source
from finetune_trainer.stage_graph import stage_before
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import StageContext


@dataclass(frozen=True)
class Contender:
    """A model and its name in the report and the gate."""

    name: str
    source: ModelSource


def contenders(run: RunConfig, index: int, spec: EvaluateSpec, storage: Storage) -> list[Contender]:
    """Return the evaluated model, then each model that it is compared with once."""
    found = [Contender(evaluated(run, index), stage_source(run, index, storage))]
    for name in dict.fromkeys(spec.compare_with):
        source = base_source(run, storage) if name == BASE else named_source(run, name, storage)
        found.append(Contender(name, source))
    return found


def form_note(contender: Contender, forms: Sequence[Form]) -> str | None:
    """Return a note if a model is measured on rows of another format than it was trained on, else None.

    Rows of plain text are ignored, because the perplexity of text is meaningful for any model.

    Args:
        forms: format of each row.
    """
    trained = None if contender.source.name is None else read_form(contender.source.name)
    other = [form for form in forms if "text" not in (form, trained) and form != trained]
    if trained is None or not other:
        return None
    return (
        f"{contender.name} was trained on {FORMS[trained]}, and {len(other)} of {len(forms)} rows are "
        f"{FORMS[other[0]]}: rows of the form that it was trained in would measure it better"
    )


def evaluated(run: RunConfig, index: int) -> str:
    """Return the name of the model that stage `index` starts from: the stage that produced it, or `base`."""
    before = stage_before(run, index)
    stages = run.job.spec.stages
    return BASE if before is None or stages[before].tokenizer is not None else stages[before].title


def open_model(contender: Contender, context: StageContext, spec: EvaluateSpec) -> Any:
    """Load a complete model onto this worker's device, in the job's precision and in evaluation mode.

    An adapter is not merged, because it cannot be merged into a quantized base.
    """
    source, job = contender.source, context.run.job.spec
    accelerator = context.placement.accelerator
    formats = precision(model_dtype(job.model.dtype, accelerator), trains_base=False, zero=0)
    device = ray.train.torch.get_device() if accelerator else torch.device("cpu")
    more: dict[str, Any] = {"quantization": spec.quantization, "seed": spec.seed, "device": device}
    model: Any = load_model(source, context.job_model, formats, trains=False, **more)
    if source.name is not None and is_adapter(source.name):
        model = attach_adapter(model, source.name)
    return on_device(model, device).eval()
