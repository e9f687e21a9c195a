"""Tokenize a row store in parallel tasks.

Number and content of the tasks depend only on the data, so the output is identical for any number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import Example
from finetune_trainer.data.row_kinds import row_kind
from finetune_trainer.data.rows import RowStore, cut_tasks
from finetune_trainer.data.shards import SHARDS, pack_shards, write_shard
from finetune_trainer.form import form_of

TEXT_TASK, ROW_TASK = 16 << 20, 2 << 20
"""Bytes of rows per task; text tasks are larger, since each drops its incomplete last block."""
MAX_TASK_ROWS = 100_000
PACK_GROUP = 16
"""Number of tasks whose examples are packed together."""

_work: Work | None = None


@dataclass(frozen=True)
class Work:
    """The input of all tasks; forked processes inherit it, and it is never pickled."""

    store: RowStore
    indices: NDArray[np.int64]
    tasks: Sequence[slice]
    encoder: Encoder
    directory: Path


def tokenise(
    store: RowStore,
    indices: NDArray[np.int64],
    tokenizer: PreTrainedTokenizerFast,
    encoding: Encoding,
    directory: Path,
    num_proc: int,
    log: Callable[[str], None],
) -> Stats:
    """Tokenize rows of the store, in order of `indices`, into shards in `directory`; return the counts."""
    directory.mkdir(parents=True)
    size = max(TEXT_TASK, 256 * (encoding.limit or 0)) if row_kind(encoding.kind).joined else ROW_TASK
    tasks = cut_tasks(store.sizes(indices), size, MAX_TASK_ROWS)
    work = Work(store, indices, tasks, Encoder(tokenizer, encoding), directory)
    total = Stats()
    for done, stats in enumerate(_run(work, min(num_proc, len(tasks))), 1):
        total.add(stats)
        log(f"tokenised {total.rows:,} of {len(indices):,} rows, {total.tokens:,} tokens ({done}/{len(tasks)})")
    return total


def _run(work: Work, num_proc: int) -> Iterator[Stats]:
    if num_proc <= 1:
        _begin(work)
        yield from map(_task, range(len(work.tasks)))
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_proc, context, _begin_process, (work,)) as pool:
        yield from pool.map(_task, range(len(work.tasks)))


def _begin_process(work: Work) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process; threads don't survive a fork
    _begin(work)


def _begin(work: Work) -> None:
    global _work
    _work = work


def _task(number: int) -> Stats:
    work = _work
    assert work is not None
    stats = Stats()
    picked = work.indices[work.tasks[number]].tolist()
    rows = ((index, _counted(work.store[index], work, stats)) for index in picked)
    stats.written = write_shard(shard(work.directory, number), work.encoder.rows(rows, stats))
    return stats


def _counted(example: Example, work: Work, stats: Stats) -> Example:
    """Count the row's form; return the row."""
    stats.forms[form_of(example, work.encoder.chat.template is not None)] += 1
    return example


def shard(directory: Path, number: int) -> Path:
    """Return the path of a task's shard."""
    return directory / f"{number:06d}.arrow"


def pack_all(source: Path, target: Path, capacity: int) -> int:
    """Pack every shard of `source` into `target`, a fixed number of shards at a time; return the number of rows."""
    target.mkdir(parents=True)
    paths = sorted(source.glob(SHARDS))
    groups = [paths[at : at + PACK_GROUP] for at in range(0, len(paths), PACK_GROUP)]
    return sum(pack_shards(group, shard(target, number), capacity) for number, group in enumerate(groups))
