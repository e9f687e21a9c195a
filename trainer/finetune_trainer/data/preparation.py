"""Prepare a stage's data: tokenize it once, into a cache keyed by content."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_api.training import TrainingSpec
from finetune_trainer.data.cache_keys import (
    FORMAT_VERSION,
    content_digest,
    hash_of,
    prepared_key,
    rows_key,
    tokenizer_key,
    tokenizer_parts,
)
from finetune_trainer.data.cache_usage import PREPARED, ROWS, named_table, note_prepared, note_table
from finetune_trainer.data.data_identity import DataKey
from finetune_trainer.data.encode import IDENTICAL, NOTHING, TOO_LONG, Encoding
from finetune_trainer.data.hashes import stream_hash, tokens_hash
from finetune_trainer.data.report import DataReport, Prepared, Stats
from finetune_trainer.data.row_formats import Kind
from finetune_trainer.data.row_kinds import row_kind
from finetune_trainer.data.rows import RowStore, order_rows, store_rows
from finetune_trainer.data.shards import read_shards
from finetune_trainer.data.source_notes import notes_of, reading_notes
from finetune_trainer.data.sources import locate
from finetune_trainer.data.streaming import StreamedRows
from finetune_trainer.data.tokenization import pack_all, tokenise
from finetune_trainer.errors import UserError

Log = Callable[[str], None]
Ready = tuple[dict[str, Dataset], DataReport, dict[str, str]]
REPORT, HASHES = "report.json", "hashes.json"
SHOWN = 3
MAX_FAULTS = 5


@dataclass(frozen=True)
class Plan:
    """How a stage's data is prepared."""

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
    stage: TrainingSpec,
    tokenizer: PreTrainedTokenizerFast,
    context: int | None,
    where: str,
    cache_dir: Path,
    base_dir: Path,
    num_proc: int,
    on_progress: Log | None = None,
) -> Prepared:
    """Return a stage's data as tokens.

    The columns of each kind of rows are documented by `encode` in its module of `row_kinds`; all are lists of int32
    unless noted:

    - pretrain: `input_ids`, each of exactly `blockSize` tokens
    - sft: `input_ids`, `labels` (-100 where there is no loss); packed also `seq_lengths`
    - rlhf: `prompt_ids` and `row`, the text of a JSON object with `prompt` (a string or messages) and `columns`
    - dpo, reward: `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_mask`, `rejected_mask`

    The result is byte-identical for any `num_proc`. With `streaming`, `train` is a `streaming.StreamedRows`.

    Args:
        context: the model's context in tokens, or None.
        where: the stage's path, such as `stages[1].sft`.

    Raises:
        UserError: the data can't be read or does not suit the stage; it lists the faults.
    """
    log = on_progress or (lambda message: None)
    encoding, packed = encoding_of(stage, context, where)
    _check_loader(stage, where)
    plan = Plan(where, encoding, packed, tokenizer, max(1, num_proc), log)
    started = time.monotonic()
    parts = _parts(stage, where, cache_dir, base_dir, log)
    ready, report, hashes = _cached(plan, parts, cache_dir / PREPARED, started) if parts else ({}, None, {})
    if report is not None and not stage.data.streaming:
        return Prepared(ready["train"], ready.get("eval"), report, _key(plan, hashes, report.rows))
    for note in reading_notes(stage.data, stage.row_kind, f"{where}.data", base_dir):
        log(note)
    stream = StreamedRows(stage.data, tokenizer, encoding, packed, f"{where}.data", base_dir)
    known = report or _report(plan, {}, {}, 0.0)
    report = replace(known, packed_rows=None, streaming=True, forms=stream.first_forms())
    hashes["train"] = stream_hash(stage.data, stream.located(), encoding, packed, tokenizer)
    return Prepared(stream, ready.get("eval"), report, _key(plan, hashes, None))


def _key(plan: Plan, hashes: dict[str, str], rows: int | None) -> DataKey:
    how = hash_of(vars(plan.encoding), plan.packed)
    return DataKey(hashes["train"], hashes.get("eval"), rows, *tokenizer_parts(plan.tokenizer), how, FORMAT_VERSION)


def encoding_of(stage: TrainingSpec, context: int | None, where: str) -> tuple[Encoding, bool]:
    """Return the encoding of the stage's rows, and whether they are packed.

    Raises:
        UserError: the stage's limit plus the length of a generated answer exceeds the model's context.
    """
    limit, answer = stage.row_limit, stage.answer_length
    room = None if context is None else context - answer
    if room is not None and room < (limit or (1 if answer else 0)):
        raise UserError([_no_room(stage, context, where)])
    return Encoding(stage.row_kind, limit or room, stage.row_overflow, stage.trained_share), stage.packs


def _no_room(stage: TrainingSpec, context: int | None, where: str) -> Problem:
    limit, answer = stage.row_limit, stage.answer_length
    answered = f"{answer} tokens of an answer" if answer else ""
    field = "generation.maxNewTokens" if limit is None else row_kind(stage.row_kind).limit_field
    got = " and ".join(filter(None, ["" if limit is None else str(limit), answered]))
    return Problem(f"{where}.{field}", f"got {got}, but the model's context is {context} tokens")


def _check_loader(stage: TrainingSpec, where: str) -> None:
    if stage.data.streaming and stage.dataloader_num_workers:
        message = f"got {stage.dataloader_num_workers}, but streaming data is read by the worker itself: set it to 0"
        raise UserError([Problem(f"{where}.dataloaderNumWorkers", message)])


def open_table(spec: DataSpec, kind: Kind, where: str, cache_dir: Path, base_dir: Path, log: Log) -> RowStore:
    """Return the spec's table from the cache, or read it; a table named by another node needs no sources.

    Args:
        log: receives a note for each source whose columns were detected.

    Raises:
        UserError: sources are missing, or rows do not have the format of `kind`.
    """
    named = named_table(spec, kind)
    if named is not None and (cache_dir / ROWS / named).is_dir():
        return RowStore(cache_dir / ROWS / named)
    located, problems = locate(spec, where, base_dir)
    if problems:
        raise UserError(problems)
    directory = cache_dir / ROWS / rows_key(located, spec, kind)
    directory.parent.mkdir(parents=True, exist_ok=True)
    note_table(spec, kind, directory.name)
    for note in notes_of(located, spec, kind, where, streaming=False):
        log(note)
    return store_rows(directory, located, spec, kind, where, log)


def training_rows(stage: TrainingSpec, where: str, cache_dir: Path, base_dir: Path) -> list[int]:
    """Return the indices of the table rows that the stage trains on, in the order of preparation."""
    parts = _parts(stage, where, cache_dir, base_dir, lambda line: None)
    return [int(row) for row in parts["train"].indices]


def _parts(stage: TrainingSpec, where: str, cache_dir: Path, base_dir: Path, log: Log) -> dict[str, Part]:
    """Return the parts to tokenize in advance: `train`, unless it is streamed, and `eval` if rows are held out."""
    kind, parts = stage.row_kind, {}
    if not stage.data.streaming:
        table = open_table(stage.data, kind, f"{where}.data", cache_dir, base_dir, log)
        train, held = order_rows(len(table), stage.data, f"{where}.data")
        parts["train"] = Part(f"{where}.data", table, train)
        if len(held):
            parts["eval"] = Part(f"{where}.data", table, held)
    if stage.eval_data is not None:
        table = open_table(stage.eval_data, kind, f"{where}.evalData", cache_dir, base_dir, log)
        whole = stage.eval_data.model_copy(update={"validation_split": 0.0})
        parts["eval"] = Part(f"{where}.evalData", table, order_rows(len(table), whole, where)[0])
    return parts


def _cached(plan: Plan, parts: dict[str, Part], cache: Path, started: float) -> Ready:
    """Return the prepared parts. The first process builds them while the others wait for its lock."""
    drawn = {name: [part.store.directory.name, content_digest(part.indices)] for name, part in parts.items()}
    directory = cache / prepared_key(drawn, plan.encoding, plan.packed, tokenizer_key(plan.tokenizer))
    cache.mkdir(parents=True, exist_ok=True)
    note_prepared(directory.name)
    with FileLock(f"{directory}.lock"):
        if cached := directory.is_dir():
            plan.log(f"found prepared data in {directory}")
        else:
            _build(directory, plan, parts, started)
    return _open(directory, cached)


def _build(directory: Path, plan: Plan, parts: dict[str, Part], started: float) -> None:
    """Prepare all parts in a temporary directory, then rename it, so that the final one is complete or absent."""
    part = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        counts = {name: _build_part(part, name, plan, one) for name, one in parts.items()}
        report = _report(plan, parts, counts, time.monotonic() - started)
        (part / REPORT).write_text(json.dumps(report.to_json(), indent=1))
        (part / HASHES).write_text(json.dumps({name: tokens_hash(part / name) for name in parts}))
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
    problems = stats_problems(stats, plan.encoding, plan.where, part.where)
    if problems:
        raise UserError(problems)


def stats_problems(stats: Stats, encoding: Encoding, where: str, data_where: str) -> list[Problem]:
    """Return the problems of rows according to the statistics of their tokenization.

    Args:
        where: the stage's path, such as `stages[1].sft`.
        data_where: the data's path, such as `stages[1].sft.data`.
    """
    problems = _row_faults(stats, data_where)
    if stats.too_long:
        problems.append(_too_long(stats, encoding, where))
    elif not problems and not stats.written:
        problems.append(Problem(data_where, _nothing_left(stats, encoding)))
    if 2 * stats.dropped[IDENTICAL] > stats.rows:
        message = f"chosen equals rejected in {stats.dropped[IDENTICAL]} of {stats.rows} pairs: there is no preference"
        problems.append(Problem(data_where, message))
    return problems


def _row_faults(stats: Stats, where: str) -> list[Problem]:
    """Return one problem for each kind of fault, with its first row."""
    reasons: dict[str, list[int]] = {}
    for row, reason in stats.faults:
        reasons.setdefault(reason, []).append(row)
    return [
        Problem(where, f"row {min(rows)}: {reason}" + (f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""))
        for reason, rows in islice(reasons.items(), MAX_FAULTS)
    ]


def _too_long(stats: Stats, encoding: Encoding, where: str) -> Problem:
    rows = ", ".join(f"row {row} ({length})" for row, length in stats.too_long[:SHOWN])
    kind = row_kind(encoding.kind)
    return Problem(
        f"{where}.{kind.limit_field}",
        f"{len(stats.too_long)} of {stats.rows} {kind.rows} are longer than {encoding.limit} tokens; the longest has "
        f"{stats.longest}: {rows}. {kind.overflow_hint}",
    )


def _nothing_left(stats: Stats, encoding: Encoding) -> str:
    if row_kind(encoding.kind).joined:
        return f"{stats.dropped_tokens} tokens do not fill one block of {encoding.limit}: set a smaller blockSize"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(stats.dropped.items()))
    was_cut = encoding.limit is not None and stats.longest > encoding.limit
    hint = " (raise maxLength)" if was_cut and (stats.dropped[TOO_LONG] or stats.dropped[NOTHING]) else ""
    return f"nothing is left to train on of {stats.rows} rows: {reasons}{hint}"


def _report(plan: Plan, parts: dict[str, Part], counts: dict[str, Stats], seconds: float) -> DataReport:
    train, held = counts.get("train", Stats()), counts.get("eval", Stats())
    blocks = plan.packed or row_kind(plan.encoding.kind).joined
    room = train.written * (plan.encoding.limit or 1)
    unread = parts["train"].store.dropped if "train" in parts else {}
    return DataReport(
        rows=train.rows + sum(unread.values()),
        kept=train.kept,
        tokens=train.tokens,
        trained_tokens=train.trained_tokens,
        truncated_examples=train.truncated_examples,
        truncated_tokens=train.truncated_tokens,
        dropped=dict(train.dropped) | unread,
        dropped_tokens=train.dropped_tokens,
        forms=dict(train.forms),
        notes=dict(train.notes),
        longest=train.longest,
        packed_rows=train.written if blocks else None,
        packing_efficiency=train.tokens / room if blocks and room else None,
        max_length=plan.encoding.limit,
        eval_rows=held.written,
        eval_tokens=held.tokens,
        bytes=sum(int(part.store.sizes(part.indices).sum()) for part in parts.values()),
        seconds=seconds,
        tokens_per_second=(train.tokens + held.tokens) / max(seconds, 1e-9),
    )


def _open(directory: Path, cached: bool) -> Ready:
    report = DataReport.from_json(json.loads((directory / REPORT).read_text()))
    ready = {name: data for name in ("train", "eval") if (data := read_shards(directory / name)) is not None}
    return ready, replace(report, cached=cached), json.loads((directory / HASHES).read_text())
