"""Open a saved model for a merge: what `model.load.load_whole` loads, with its values left in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.hub import hub_access
from finetune_trainer.model.checkpoint_matching import loaded_on_meta, own_name
from finetune_trainer.model.config import read_config
from finetune_trainer.model.generation import read_generation_config
from finetune_trainer.model.load import JobModel, fitting, plain_place, repair
from finetune_trainer.model.prequantized import method_of
from finetune_trainer.model.saved_base import SavedBase
from finetune_trainer.model.saved_model import expert_base_of
from finetune_trainer.model.vocabulary import added_rows
from finetune_trainer.model.weights import tensor_files, weight_files


def open_base(
    name: str,
    auto: Any,
    *,
    revision: str | None = None,
    config: PretrainedConfig | None = None,
    job: JobModel | None = None,
    new_head: bool = False,
    rows: int | None = None,
    dtype: str | torch.dtype = "auto",
) -> SavedBase | None:
    """Return a saved model, or the base of an expert adapter with its experts in place, to be read tensor by tensor.

    None where that is not possible: weights that stay quantized, tensors that go by other names in the files.

    Args:
        name: directory or hub id.
        auto: transformers' class that loads it.
        rows: of the embeddings. Default: as many as the job's tokenizer needs.

    Raises:
        UserError: the checkpoint lacks weights or holds others than the model's.
        Outage: the hub does not answer.
    """
    if is_expert_adapter(name):
        more: dict[str, Any] = {"config": config, "job": job, "new_head": new_head, "rows": rows, "dtype": dtype}
        base = open_base(expert_base_of(name), auto, **more)
        return None if base is None else base.overlaid(Path(name))
    with hub_access(name, "model", revision):
        place, revision, config = plain_place(name, revision, config or read_config(name, revision), job)
        if method_of(config) is not None:
            return None
        base = _opened(place, auto, revision, config, new_head, dtype)
    if rows is None and job is not None:
        rows = added_rows(job.spec, config, job.tokenizer)
    base.model.name_or_path = name
    return base if rows is None else base.resized(rows)


def _opened(
    name: str, auto: Any, revision: str | None, config: PretrainedConfig, new_head: bool, dtype: str | torch.dtype
) -> SavedBase:
    match = fitting(name, config, auto, revision, new_head)
    files = tensor_files(weight_files(name, revision, getattr(config, "transformers_weights", None)))
    model = loaded_on_meta(files, config, auto, match, dtype)
    if model.can_generate():
        model.generation_config = read_generation_config(name, config, revision)
    repair(model)
    return SavedBase(model, {own_name(raw, match.removed): one for raw, one in files.items()})
