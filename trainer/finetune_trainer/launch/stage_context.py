"""The context of a stage on one worker, from which its trainer is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import StageSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.data import Prepared, prepare
from finetune_trainer.errors import UserError
from finetune_trainer.launch.sharing.node_files import NodeFiles
from finetune_trainer.model.config import context_length, load_config, load_tokenizer
from finetune_trainer.model.reward_score import set_distinct_pad_token
from finetune_trainer.model.source import stage_source
from finetune_trainer.plan.steps import rows_per_step
from finetune_trainer.stage_graph import layouts, place, scratch, spec_of, waits_for
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import Placement, StageContext
from finetune_trainer.training.stage_work import StageWork


def stage_context(
    run: RunConfig,
    work: StageWork,
    threads: int,
    placement: Placement,
    storage: Storage,
    files: NodeFiles | None = None,
) -> StageContext:
    """Return the context of a stage; its data is read from the cache or prepared.

    Args:
        files: shared files of the nodes if the stage runs in a worker group.
    """
    index = work.index
    layout, spec = layouts(run)[index], spec_of(run, index)
    files = files or NodeFiles(run, storage, placement, Collectives(), 1, print)
    source = files.once_per_node(lambda: stage_source(run, index, storage))
    tokenizer = load_tokenizer(source)
    config = load_config(source, tokenizer)
    data = _prepared(run, index, spec, tokenizer, context_length(config), threads, files)
    if spec.task == "reward":  # after the data, whose cache key depends on the tokenizer's tokens
        set_distinct_pad_token(tokenizer, config.get_text_config().vocab_size)
    output = storage.local(layout.checkpoints) or scratch(run, index)
    rows = work.rows_per_step or _rows_per_step(spec, placement.world_size)
    shards = work.shards or placement.world_size
    if rows < placement.world_size:
        message = f"{placement.world_size} workers can't share the {rows} rows of a step: use at most {rows} workers"
        raise UserError([Problem("resources", message)])
    return StageContext(
        run, layout, source, tokenizer, config, data, placement, work.zero, output, rows, shards, work.trained
    )


def _prepared(
    run: RunConfig,
    index: int,
    spec: StageSpec,
    tokenizer: Any,
    context: int | None,
    threads: int,
    files: NodeFiles,
) -> Prepared | None:
    """Return the stage's data from the cache; data that another stage made is prepared by the first worker."""
    if not isinstance(spec, TrainingSpec):
        return None

    def work() -> Prepared:
        return prepare(
            spec,
            tokenizer,
            context,
            where=place(run, index),
            cache_dir=Path(run.cache_dir),
            base_dir=Path(run.base_dir),
            num_proc=threads,
        )

    made_in_this_run = any(True for _ in waits_for(run, index))
    return files.prepare_once(work) if made_in_this_run else work()


def _rows_per_step(spec: StageSpec, workers: int) -> int:
    return rows_per_step(spec, workers) if isinstance(spec, TrainingSpec) else workers
