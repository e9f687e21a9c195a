"""Check storage and data by using them: write a file, and tokenize the first rows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import EvaluateSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.data.sample_check import sample_problems
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.rows import eval_rows
from finetune_trainer.model.config import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.preflight.data import data_problems
from finetune_trainer.stage_graph import place, waits_for
from finetune_trainer.storage.filesystem import Storage

PREFLIGHT_SECONDS = 20.0
"""Timeout of requests to a store in preflight: a wrong address never responds."""


def row_problems(run: RunConfig) -> list[Problem]:
    """Return the faults of the storage, else of the data, else of the first rows: each would cause the next."""
    try:
        _writable(run)
        return list(data_problems(run)) or first_row_problems(run)
    except UserError as error:
        return error.problems


def first_row_problems(run: RunConfig) -> list[Problem]:
    """Return the faults found by tokenizing the first rows of each stage whose data is available."""
    try:
        return list(_sample(run))
    except UserError as error:
        return error.problems


def _sample(run: RunConfig) -> Iterator[Problem]:
    """Yield the faults of the first rows; none if the tokenizer is not trained yet."""
    stages = run.job.spec.stages
    if stages[0].tokenizer is not None:
        return
    source = stage_source(run, 0, Storage(run.root))
    tokenizer = load_tokenizer(source)
    context = context_length(load_config(source, tokenizer))
    for index, stage in enumerate(stages):
        if list(waits_for(run, index)):
            continue
        if stage.evaluate is not None:
            yield from _rows(run, index, stage.evaluate, tokenizer, context)
        if isinstance(stage.spec, TrainingSpec):
            yield from sample_problems(stage.spec, tokenizer, context, place(run, index), Path(run.base_dir))


def _rows(
    run: RunConfig, index: int, spec: EvaluateSpec, tokenizer: PreTrainedTokenizerFast, context: int | None
) -> list[Problem]:
    """Return the faults of an evaluation's rows, all of which are read."""
    try:
        eval_rows(spec, tokenizer, context, place(run, index), Path(run.cache_dir), Path(run.base_dir))
    except UserError as error:
        return error.problems
    return []


def _writable(run: RunConfig) -> None:
    """Write a file into the job's directory and delete it again.

    Raises:
        UserError: the store can't be reached or rejects the write.
    """
    name = f".preflight-{uuid.uuid4().hex[:8]}"
    field = "storage.uri" if run.job.spec.storage.uri else "storage.path"
    try:
        storage = Storage(run.root, retry_seconds=PREFLIGHT_SECONDS)
        storage.write_text(name, "")
        storage.delete(name)
    except Exception as error:  # each store has its own error classes
        raise UserError([Problem(field, f"can't write to {run.root}: {type(error).__name__}: {error}")]) from error
