"""Tokenize the first rows of a stage's data, to report in seconds what would otherwise fail hours later."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_api.training import TrainingSpec
from finetune_trainer.data.encode import Encoder
from finetune_trainer.data.preparation import encoding_of, stats_problems
from finetune_trainer.data.report import Stats
from finetune_trainer.data.sources import locate
from finetune_trainer.data.streaming import table_rows
from finetune_trainer.errors import UserError

SAMPLE_ROWS = 256


def sample_problems(
    stage: TrainingSpec, tokenizer: PreTrainedTokenizerFast, context: int | None, where: str, base_dir: Path
) -> list[Problem]:
    """Return the problems of tokenizing the first rows of a stage's data.

    Rows may be too long or empty, the tokenizer may have no chat template, or its template may refuse a conversation or
    render it so that the assistant's turns can't be separated from the rest.

    Args:
        where: the stage's path, such as `stages[1].sft`.
    """
    try:
        encoder = Encoder(tokenizer, encoding_of(stage, context, where)[0])
        problems = _row_problems(encoder, stage.data, where, f"{where}.data", base_dir)
        if stage.eval_data is not None:
            problems += _row_problems(encoder, stage.eval_data, where, f"{where}.evalData", base_dir)
    except UserError as error:
        return error.problems
    return problems


def _row_problems(encoder: Encoder, spec: DataSpec, where: str, data_where: str, base_dir: Path) -> list[Problem]:
    located, problems = locate(spec, data_where, base_dir)
    if problems:
        return problems
    table = islice(table_rows(located, spec, encoder.encoding.kind, data_where), SAMPLE_ROWS)
    rows, stats = [example for example, _ in table], Stats()
    stats.written = sum(1 for _ in encoder.rows(enumerate(rows), stats))
    if len(rows) == SAMPLE_ROWS:  # later rows may have trained tokens
        stats.written = max(1, stats.written)
    return stats_problems(stats, encoder.encoding, where, data_where)
