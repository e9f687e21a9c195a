"""The rows that a model is measured on: what it is asked, what it should answer, what it is to find likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune_api.problems import Problem
from finetune_api.stages import Database, EvaluateSpec
from finetune_api.stages.evaluation import PERPLEXITY
from finetune_trainer.data.cache_keys import hash_of
from finetune_trainer.data.encode import IGNORED, Encoder, Encoding
from finetune_trainer.data.preparation import open_table
from finetune_trainer.data.prompts import has_reference, prompt_of
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import Example
from finetune_trainer.data.rows import order_rows
from finetune_trainer.data.template import ChatError
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.query_execution import open_database, query_in, returned
from finetune_trainer.form import Form, form_of
from finetune_trainer.queries.result import QueryFailed

SHOWN = 5


@dataclass(frozen=True)
class Piece:
    """Tokens that are read at once, with the labels of those that count (-100: not)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EvalRow:
    """One row. `number` is its place among the rows of the evaluation."""

    number: int
    pieces: tuple[Piece, ...]
    """For perplexity: the row, cut where the model's context ends."""
    prompt: tuple[int, ...]
    """For answers: tokens up to where one starts."""
    shown: Any
    """The prompt as people read it: a text, or messages."""
    reference: str
    cut: bool
    """Whether the prompt's beginning was left out, to leave room for an answer."""
    form: Form
    """How the model is asked."""

    @property
    def length(self) -> int:
        """Tokens of the longest thing that the model reads."""
        return max([len(self.prompt), *(len(piece.ids) for piece in self.pieces)])

    @property
    def key(self) -> str:
        """Hash of what the model reads and should answer: what was measured on another row does not count for it."""
        return hash_of([[piece.ids, piece.labels] for piece in self.pieces], self.prompt, self.reference)


def eval_rows(
    spec: EvaluateSpec,
    tokenizer: PreTrainedTokenizerFast,
    context: int | None,
    where: str,
    cache_dir: Path,
    base_dir: Path,
) -> list[EvalRow]:
    """The rows of an evaluation: the held-out ones where the data has a `validationSplit`, else all.

    Args:
        where: the stage's path, such as `stages[2].evaluate`.

    Raises:
        UserError: the data can't be read or does not suit the metrics; all faults that were found.
    """
    if spec.data is None:
        return []
    room = _room(spec, context, where)
    table = open_table(spec.data, spec.row_kind, f"{where}.data", cache_dir, base_dir, lambda message: None)
    rest, held = order_rows(len(table), spec.data, f"{where}.data")
    chosen = (held if len(held) else rest).tolist()
    reader = _Reader(spec, Encoder(tokenizer, Encoding("sft", context, "split")), room)
    rows, problems = [], []
    for number, index in enumerate(chosen):
        try:
            rows.append(reader.read(number, table[int(index)]))
        except (ChatError, ValueError) as error:
            problems.append(Problem(f"{where}.data", f"row {index}: {error}"))
    if problems:
        raise UserError(problems[:SHOWN])
    if spec.database is not None:
        _check_references(spec.database, rows, where, base_dir, cache_dir)
    return rows


def batches(rows: Sequence[EvalRow], size: int) -> list[list[EvalRow]]:
    """Rows of like length together, the longest first: the same batches for any number of workers."""
    ordered = sorted(rows, key=lambda row: (-row.length, row.number))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


@dataclass(frozen=True)
class _Reader:
    spec: EvaluateSpec
    encoder: Encoder
    room: int | None
    """Most tokens of a prompt."""

    def read(self, number: int, example: Example) -> EvalRow:
        """Raises ChatError or ValueError for a row that does not suit the metrics."""
        pieces = self._pieces(example) if PERPLEXITY in self.spec.metrics else ()
        form = form_of(example, self.encoder.chat.template is not None)
        if not self.spec.generates:
            return EvalRow(number, pieces, (), _shown(example), "", cut=False, form=form)
        if not has_reference(example):
            raise ValueError("it has no reference: expected an assistant's answer, or `prompt` and `completion`")
        ids = self.encoder.prompt(example)
        if not ids:
            raise ValueError("its prompt is empty")
        kept = ids if self.room is None else ids[-self.room :]
        reference = str((prompt_of(example) or {})["reference"]).strip()
        return EvalRow(number, pieces, tuple(kept), _shown(example), reference, len(kept) < len(ids), form)

    def _pieces(self, example: Example) -> tuple[Piece, ...]:
        stats = Stats()
        found = tuple(
            Piece(columns["input_ids"].tolist(), columns["labels"].tolist())
            for columns in self.encoder.rows([(0, example)], stats)
        )
        if stats.faults:
            raise ChatError(stats.faults[0][1])
        if not any(label != IGNORED for piece in found for label in piece.labels):
            raise ValueError("it has no token to predict")
        return found


def _shown(example: Example) -> Any:
    asked = prompt_of(example) or {}
    return asked.get("messages") or asked.get("prompt") or ""


def _room(spec: EvaluateSpec, context: int | None, where: str) -> int | None:
    """Tokens that a prompt may have, so that an answer has all that it may have."""
    if context is None or not spec.generates:
        return None
    room = context - spec.generation.max_new_tokens
    if room < 1:
        message = f"got {spec.generation.max_new_tokens}, but the model's context is {context} tokens, prompt included"
        raise UserError([Problem(f"{where}.generation.maxNewTokens", message)])
    return room


def _check_references(database: Database, rows: list[EvalRow], where: str, base_dir: Path, cache_dir: Path) -> None:
    """A reference that does not run can be matched by no answer."""
    problems = []
    with open_database(database, f"{where}.database", base_dir, cache_dir) as sandbox:
        for row in rows:
            try:
                returned(sandbox, query_in(row.reference))
            except QueryFailed as error:
                problems.append(Problem(f"{where}.data", f"the reference {row.reference!r} fails: {error}"))
    if problems:
        raise UserError(problems[:SHOWN])
