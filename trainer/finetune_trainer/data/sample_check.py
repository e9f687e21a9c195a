"""A first look at a stage's data through its tokenizer: what would fail hours later fails in seconds."""

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
    """Return what is wrong with the first rows of a stage's data once they are tokens.

    They are too long or empty, the tokenizer has no chat template, or its template refuses a conversation or does not
    let the assistant's turns be told from the rest.

    Args:
        where: the stage's path, such as `stages[1].sft`.
    """
    try:
        encoder = Encoder(tokenizer, encoding_of(stage, context, where)[0])
        problems = _of_rows(encoder, stage.data, where, f"{where}.data", base_dir)
        if stage.eval_data is not None:
            problems += _of_rows(encoder, stage.eval_data, where, f"{where}.evalData", base_dir)
    except UserError as error:
        return error.problems
    return problems


def _of_rows(encoder: Encoder, spec: DataSpec, where: str, data_where: str, base_dir: Path) -> list[Problem]:
    located, problems = locate(spec, data_where, base_dir)
    if problems:
        return problems
    table = islice(table_rows(located, spec, encoder.encoding.kind, data_where), SAMPLE_ROWS)
    rows, stats = [example for example, _ in table], Stats()
    stats.written = sum(1 for _ in encoder.rows(enumerate(rows), stats))
    if len(rows) == SAMPLE_ROWS:  # a later row may have what these lack
        stats.written = max(1, stats.written)
    return stats_problems(stats, encoder.encoding, where, data_where)
