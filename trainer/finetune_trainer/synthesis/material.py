"""Read the input of a stage (chunks of documents, seeds, schemas) and the evaluation texts that it must not repeat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.data import DataSpec
from finetune_api.problems import Problem, did_you_mean
from finetune_api.stages import Decontaminate, SynthesizeSpec
from finetune_trainer.data.preparation import open_table
from finetune_trainer.data.row_formats import Example
from finetune_trainer.data.rows import order_rows
from finetune_trainer.data.sources import join_row, locate_source, source_rows
from finetune_trainer.errors import UserError
from finetune_trainer.queries.sandbox import Sandbox
from finetune_trainer.synthesis.cleaning import EvaluationTexts, texts_in
from finetune_trainer.synthesis.databases import engine_of, schema_text
from finetune_trainer.synthesis.effects import Item
from finetune_trainer.synthesis.evolve import evolve_items
from finetune_trainer.synthesis.pairs import pair_items
from finetune_trainer.synthesis.questions import Chunk, chunks, question_items
from finetune_trainer.synthesis.teacher_requests import Teacher

NO_INSTRUCTION = "no row has an instruction"


def stage_items(
    spec: SynthesizeSpec, teacher: Teacher, where: str, base_dir: Path, cache_dir: Path, sandbox: Sandbox | None
) -> list[Item]:
    """Return all items of the stage, in order.

    Raises:
        UserError: the data can't be read, or gives no items.
    """
    if spec.questions is not None:
        return question_items(document_chunks(spec, where, base_dir, cache_dir), spec.questions, teacher)
    if spec.evolve is not None:
        return evolve_items(seeds(spec, where, base_dir, cache_dir), spec.evolve, teacher)
    pairs = spec.text2sql or spec.text2cypher
    assert pairs is not None and sandbox is not None
    schema = schema_text(pairs.database, sandbox, pairs.sample_rows, base_dir)
    return pair_items(spec.method, engine_of(pairs.database), schema, pairs, teacher)


def document_chunks(spec: SynthesizeSpec, where: str, base_dir: Path, cache_dir: Path) -> list[Chunk]:
    """Return the documents' chunks.

    Raises:
        UserError: see `stage_items`.
    """
    assert spec.questions is not None
    size, overlap = spec.questions.chunk_size, spec.questions.chunk_overlap
    found: list[Chunk] = []
    for number, example in _examples(spec, where, base_dir, cache_dir):
        found += chunks(number, example["text"], size, overlap)
    if not found:
        raise UserError([Problem(f"{where}.data", "every document is empty")])
    return found


def seeds(spec: SynthesizeSpec, where: str, base_dir: Path, cache_dir: Path) -> list[tuple[int, str]]:
    """Return the seed instructions with their row numbers.

    Raises:
        UserError: see `stage_items`.
    """
    found = [(number, instruction(example)) for number, example in _examples(spec, where, base_dir, cache_dir)]
    found = [(number, text) for number, text in found if text]
    if not found:
        raise UserError([Problem(f"{where}.data", NO_INSTRUCTION)])
    return found


def instruction(example: Example) -> str:
    """Return a row's instruction: its prompt, or the last user message in it."""
    prompt = example["prompt"]
    if isinstance(prompt, str):
        return prompt.strip()
    user_texts = [str(message["content"]) for message in prompt if message["role"] == "user"]
    return user_texts[-1].strip() if user_texts else ""


def _examples(spec: SynthesizeSpec, where: str, base_dir: Path, cache_dir: Path) -> Iterator[tuple[int, Example]]:
    data = spec.data
    assert isinstance(data, DataSpec)
    store = open_table(data, spec.row_kind, f"{where}.data", cache_dir, base_dir, lambda message: None)
    chosen, _ = order_rows(len(store), data.model_copy(update={"validation_split": 0.0}), f"{where}.data")
    for index in chosen:
        yield int(index), store[int(index)]


def evaluation_texts(spec: Decontaminate, where: str, base_dir: Path) -> EvaluationTexts:
    """Return the texts that rows must not share.

    Args:
        where: the spec's path, such as `stages[0].synthesize.decontaminate`.

    Raises:
        UserError: a source can't be read or lacks a column.
    """
    return EvaluationTexts(_texts(spec, where, base_dir), spec.ngram)


def _texts(spec: Decontaminate, where: str, base_dir: Path) -> Iterator[str]:
    for index, source in enumerate(spec.sources):
        at = f"{where}.sources[{index}]"
        located = locate_source(source, at, base_dir)
        for row, _, _ in source_rows(located, index):
            yield from texts_in(_columns(join_row(row, located, at), spec, where))


def _columns(row: dict[str, Any], spec: Decontaminate, where: str) -> Any:
    if spec.columns is None:
        return row
    for at, name in enumerate(spec.columns):
        if name not in row:
            raise UserError([Problem(f"{where}.columns[{at}]", f"no column `{name}`{did_you_mean(name, row)}")])
    return [row[name] for name in spec.columns]
