"""Read the rows of an evaluation: tokens for perplexity, prompts to complete, and reference answers."""

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
    """A sequence of one forward pass, with labels (-100 for tokens that are not measured)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EvalRow:
    """One row. `number` is its index among the rows of the evaluation."""

    number: int
    pieces: tuple[Piece, ...]
    """For perplexity: the row, split at the length of the model's context."""
    prompt: tuple[int, ...]
    """For generation: token ids up to the start of the answer."""
    shown: Any
    """The prompt in readable form: a string or messages."""
    reference: str
    cut: bool
    """Whether the start of the prompt was cut off, to leave room for an answer."""
    form: Form
    """Format in which the row is presented to the model."""

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence that the model reads."""
        return max([len(self.prompt), *(len(piece.ids) for piece in self.pieces)])

    @property
    def key(self) -> str:
        """Hash of the row's tokens and reference, by which stored results are matched to rows."""
        return hash_of([[piece.ids, piece.labels] for piece in self.pieces], self.prompt, self.reference)


def eval_rows(
    spec: EvaluateSpec,
    tokenizer: PreTrainedTokenizerFast,
    context: int | None,
    where: str,
    cache_dir: Path,
    base_dir: Path,
) -> list[EvalRow]:
    """Return the rows of an evaluation: the held-out ones if the data has a `validationSplit`, else all.

    Args:
        where: the stage's path, such as `stages[2].evaluate`.

    Raises:
        UserError: the data can't be read or does not suit the metrics.
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
    """Return batches of rows of similar length, longest first, independent of the number of workers."""
    ordered = sorted(rows, key=lambda row: (-row.length, row.number))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


@dataclass(frozen=True)
class _Reader:
    spec: EvaluateSpec
    encoder: Encoder
    room: int | None
    """Maximum number of tokens of a prompt."""

    def read(self, number: int, example: Example) -> EvalRow:
        """Return the row. Raises ChatError or ValueError if it does not suit the metrics."""
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
    """Return the maximum length of a prompt that leaves room for `maxNewTokens`; None if there is no limit."""
    if context is None or not spec.generates:
        return None
    room = context - spec.generation.max_new_tokens
    if room < 1:
        message = f"got {spec.generation.max_new_tokens}, but the model's context is {context} tokens, prompt included"
        raise UserError([Problem(f"{where}.generation.maxNewTokens", message)])
    return room


def _check_references(database: Database, rows: list[EvalRow], where: str, base_dir: Path, cache_dir: Path) -> None:
    """Raise UserError if a reference query fails, because no answer could match it."""
    problems = []
    with open_database(database, f"{where}.database", base_dir, cache_dir) as sandbox:
        for row in rows:
            try:
                returned(sandbox, query_in(row.reference))
            except QueryFailed as error:
                problems.append(Problem(f"{where}.data", f"the reference {row.reference!r} fails: {error}"))
    if problems:
        raise UserError(problems[:SHOWN])
