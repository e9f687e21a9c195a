"""Preparation of a stage's data: tokenised once into a cache keyed by content, whoever asks for it first."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_api.stages import DpoSpec, PretrainSpec, SftSpec
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.encode import IDENTICAL, TOO_LONG, Encoding
from finetune_trainer.data.forms import Kind, kind_of
from finetune_trainer.data.keys import prepared_key, rows_key, tokenizer_key
from finetune_trainer.data.report import DataReport, Prepared, Stats
from finetune_trainer.data.rows import RowStore, order_rows, store_rows
from finetune_trainer.data.shards import read_shards
from finetune_trainer.data.sources import locate
from finetune_trainer.data.tasks import pack_all, tokenise
from finetune_trainer.errors import UserError

TrainedStage = PretrainSpec | SftSpec | DpoSpec
Log = Callable[[str], None]
REPORT = "report.json"
SHOWN = 3


@dataclass(frozen=True)
class Plan:
    """What is to be prepared and how."""

    where: str
    encoding: Encoding
    packed: bool
    tokenizer: PreTrainedTokenizerFast
    num_proc: int
    log: Log


@dataclass(frozen=True)
class Part:
    """One part of the data: rows of a store, in order."""

    where: str
    store: RowStore
    indices: NDArray[np.int64]


def prepare(
    stage: TrainedStage,
    tokenizer: PreTrainedTokenizerFast,
    context: int | None,
    where: str,
    cache_dir: Path,
    base_dir: Path,
    num_proc: int,
    on_progress: Log | None = None,
) -> Prepared:
    """Data of a stage, tokenised. `where` is the stage's path, such as `stages[1].sft`.

    Columns, all lists of int32:

    - pretrain: `input_ids`, each of exactly `blockSize` tokens
    - sft: `input_ids`, `labels` (-100 where there is no loss); packed also `seq_lengths`
    - dpo: `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_mask`, `rejected_mask`

    The result is the same bytes for any `num_proc`. With `streaming`, `train` is a `streaming.StreamedRows`.

    Raises:
        UserError: the data can't be read or does not suit the stage; all faults that were found.
    """
    log = on_progress or (lambda message: None)
    encoding, packed = encoding_of(stage, context, where)
    plan = Plan(where, encoding, packed, tokenizer, max(1, num_proc), log)
    if stage.data.streaming:
        return _streamed(stage, plan, cache_dir, base_dir)
    started = time.monotonic()
    kind = kind_of(stage)
    tables = [open_table(stage.data, kind, f"{where}.data", cache_dir, base_dir, log)]
    specs = [stage.data]
    if stage.eval_data is not None:
        tables.append(open_table(stage.eval_data, kind, f"{where}.evalData", cache_dir, base_dir, log))
        specs.append(stage.eval_data)
    keys = [table.directory.name for table in tables]
    key = prepared_key(keys, specs, encoding, packed, tokenizer_key(tokenizer))
    directory = cache_dir / "prepared" / key
    with FileLock(f"{directory}.lock"):
        if cached := directory.is_dir():
            log(f"found prepared data in {directory}")
        else:
            _build(directory, plan, _parts(tables, specs, where), started)
    return _open(directory, cached)


def encoding_of(stage: TrainedStage, context: int | None, where: str) -> tuple[Encoding, bool]:
    """How the stage's rows become tokens, and whether they are packed.

    Raises:
        UserError: the length asked for is more than the model takes.
    """
    field, length = (
        ("blockSize", stage.block_size) if isinstance(stage, PretrainSpec) else ("maxLength", stage.max_length)
    )
    if length is not None and context is not None and length > context:
        message = f"got {length}, but the model's context is {context} tokens"
        raise UserError([Problem(f"{where}.{field}", message)])
    if isinstance(stage, PretrainSpec):
        share = stage.mlm_probability if stage.objective == "masked" else 1.0
        return Encoding("text", length, "split", share), False
    overflow = stage.overflow if stage.overflow != "auto" else "error" if length is None else "truncate"
    return Encoding(kind_of(stage), length or context, overflow), isinstance(stage, SftSpec) and stage.packing


def open_table(spec: DataSpec, kind: Kind, where: str, cache_dir: Path, base_dir: Path, log: Log) -> RowStore:
    """The spec's table, from the cache or read into it.

    Raises:
        UserError: sources are missing, or rows are not in the form that `kind` needs.
    """
    located, problems = locate(spec, where, base_dir)
    if problems:
        raise UserError(problems)
    directory = cache_dir / "rows" / rows_key(located, spec, kind)
    directory.parent.mkdir(parents=True, exist_ok=True)
    return store_rows(directory, located, spec, kind, where, log)


def _parts(tables: list[RowStore], specs: list[DataSpec], where: str) -> list[Part]:
    """The training part, and the held-out part where there is one."""
    train, held = order_rows(len(tables[0]), specs[0], f"{where}.data")
    parts = [Part(f"{where}.data", tables[0], train)]
    if len(tables) == 2:
        spec = specs[1].model_copy(update={"validation_split": 0.0})
        parts.append(Part(f"{where}.evalData", tables[1], order_rows(len(tables[1]), spec, where)[0]))
    elif len(held):
        parts.append(Part(f"{where}.data", tables[0], held))
    return parts


def _build(directory: Path, plan: Plan, parts: list[Part], started: float) -> None:
    """Prepare all parts in a directory beside the final one, then rename it: it is whole or not there."""
    part = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        counts = [_build_part(part, name, plan, one) for name, one in zip(("train", "eval"), parts, strict=False)]
        report = _report(plan, parts, counts, time.monotonic() - started)
        (part / REPORT).write_text(json.dumps(report.to_json(), indent=1))
        os.rename(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _build_part(root: Path, name: str, plan: Plan, part: Part) -> Stats:
    target = root / name
    unpacked = root / f"{name}-unpacked" if plan.packed else target
    stats = tokenise(part.store, part.indices, plan.tokenizer, plan.encoding, unpacked, plan.num_proc, plan.log)
    _check(stats, plan, part)
    if plan.packed:
        assert plan.encoding.limit is not None
        stats.written = pack_all(unpacked, target, plan.encoding.limit)
        shutil.rmtree(unpacked)
    return stats


def _check(stats: Stats, plan: Plan, part: Part) -> None:
    problems = [Problem(part.where, f"row {row}: {reason}") for row, reason in stats.faults[:5]]
    if stats.too_long:
        problems.append(_too_long(stats, plan))
    elif not problems and not stats.written:
        problems.append(Problem(part.where, _nothing_left(stats, plan.encoding)))
    if 2 * stats.dropped[IDENTICAL] > stats.rows:
        message = f"chosen equals rejected in {stats.dropped[IDENTICAL]} of {stats.rows} pairs: there is no preference"
        problems.append(Problem(part.where, message))
    if problems:
        raise UserError(problems)


def _too_long(stats: Stats, plan: Plan) -> Problem:
    rows = ", ".join(f"row {row} ({length})" for row, length in stats.too_long[:SHOWN])
    limit = plan.encoding.limit
    return Problem(
        f"{plan.where}.maxLength",
        f"{len(stats.too_long)} of {stats.rows} examples are longer than {limit} tokens; the longest has "
        f"{stats.longest}: {rows}. Set maxLength up to the model's context to cut them, or overflow: truncate, drop"
        f"{' or split' if plan.encoding.kind == 'sft' else ''}",
    )


def _nothing_left(stats: Stats, encoding: Encoding) -> str:
    if encoding.kind == "text":
        return f"{stats.dropped_tokens} tokens do not fill one block of {encoding.limit}: set a smaller blockSize"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stats.dropped.items()))
    hint = " (raise maxLength)" if stats.dropped[TOO_LONG] or encoding.limit else ""
    return f"nothing is left to train on of {stats.rows} rows: {reasons}{hint}"


def _report(plan: Plan, parts: list[Part], counts: list[Stats], seconds: float) -> DataReport:
    train, held = counts[0], counts[1] if len(counts) > 1 else Stats()
    blocks = plan.packed or plan.encoding.kind == "text"
    room = train.written * (plan.encoding.limit or 1)
    unread = parts[0].store.dropped
    return DataReport(
        rows=train.rows + sum(unread.values()),
        kept=train.kept,
        tokens=train.tokens,
        trained_tokens=train.trained_tokens,
        truncated_examples=train.truncated_examples,
        truncated_tokens=train.truncated_tokens,
        dropped=dict(train.dropped) | unread,
        dropped_tokens=train.dropped_tokens,
        longest=train.longest,
        packed_rows=train.written if blocks else None,
        packing_efficiency=train.tokens / room if blocks else None,
        max_length=plan.encoding.limit,
        eval_rows=held.written,
        eval_tokens=held.tokens,
        bytes=sum(int(part.store.sizes(part.indices).sum()) for part in parts),
        seconds=seconds,
        tokens_per_second=(train.tokens + held.tokens) / max(seconds, 1e-9),
    )


def _open(directory: Path, cached: bool) -> Prepared:
    report = DataReport.from_json(json.loads((directory / REPORT).read_text()))
    held = read_shards(directory / "eval") if (directory / "eval").is_dir() else None
    return Prepared(read_shards(directory / "train"), held, replace(report, cached=cached))


def _streamed(stage: TrainedStage, plan: Plan, cache_dir: Path, base_dir: Path) -> Prepared:
    raise UserError([Problem(f"{plan.where}.data.streaming", "not there yet")])
