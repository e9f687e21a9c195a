"""A first look at a stage's data through its tokenizer: what would fail hours later fails in seconds."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune_api.problems import Problem
from finetune_api.stages import TrainedSpec
from finetune_trainer.data.preparation import encoding_of
from finetune_trainer.data.streaming import StreamedRows
from finetune_trainer.errors import UserError

SAMPLE_ROWS = 256


def sample_problems(
    stage: TrainedSpec, tokenizer: PreTrainedTokenizerFast, context: int | None, where: str, base_dir: Path
) -> list[Problem]:
    """What is wrong with the first rows of a stage's data once they are tokens: no chat template, too long, empty.

    Args:
        where: the stage's path, such as `stages[1].sft`.
    """
    try:
        encoding, packed = encoding_of(stage, context, where)
        rows = StreamedRows(stage.data, tokenizer, encoding, packed, f"{where}.data", base_dir)
        for _ in islice(rows, SAMPLE_ROWS):
            pass
    except UserError as error:
        return error.problems
    return []
