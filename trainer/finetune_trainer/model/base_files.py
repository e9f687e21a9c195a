"""Open a saved model for a merge: the model that `model.load.load_whole` loads, without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from finetune_trainer.esft.adapter_files import is_expert_adapter
from finetune_trainer.hub import hub_access
from finetune_trainer.model.checkpoint_matching import model_on_meta, name_in_model
from finetune_trainer.model.config import read_config
from finetune_trainer.model.generation import read_generation_config
from finetune_trainer.model.load import JobModel, repair, require_match, resolve_weights
from finetune_trainer.model.prequantized import quantization_method
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
    """Return a saved model whose tensors are read one at a time. For an expert adapter: its base with the experts.

    Args:
        name: directory or hub id.
        auto: transformers' auto class that loads the model.
        rows: number of embedding rows. Default: as many as the job's tokenizer needs.

    Returns:
        the model, or None where it can't be read tensor by tensor: quantized weights, or tensors whose names in the
        files differ.

    Raises:
        UserError: the checkpoint lacks weights or holds weights that the model does not have.
        Outage: the hub does not answer.
    """
    if is_expert_adapter(name):
        options: dict[str, Any] = {"config": config, "job": job, "new_head": new_head, "rows": rows, "dtype": dtype}
        base = open_base(expert_base_of(name), auto, **options)
        return None if base is None else base.overlaid(Path(name))
    with hub_access(name, "model", revision):
        path, revision, config = resolve_weights(name, revision, config or read_config(name, revision), job)
        if quantization_method(config) is not None:
            return None
        base = _open(path, auto, revision, config, new_head, dtype)
    if rows is None and job is not None:
        rows = added_rows(job.spec, config, job.tokenizer)
    base.model.name_or_path = name
    return base if rows is None else base.resized(rows)


def _open(
    name: str, auto: Any, revision: str | None, config: PretrainedConfig, new_head: bool, dtype: str | torch.dtype
) -> SavedBase:
    match = require_match(name, config, auto, revision, new_head)
    files = tensor_files(weight_files(name, revision, getattr(config, "transformers_weights", None)))
    model = model_on_meta(files, config, auto, match, dtype)
    if model.can_generate():
        model.generation_config = read_generation_config(name, config, revision)
    repair(model)
    return SavedBase(model, {name_in_model(raw, match.removed): one for raw, one in files.items()})
