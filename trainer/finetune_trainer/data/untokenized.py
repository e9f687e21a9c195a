"""Read rows as text: a corpus to train a tokenizer on, and prompts for samples before and after a stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_api.data import DataSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.data.preparation import open_table
from finetune_trainer.data.prompts import Prompt, prompt_of
from finetune_trainer.data.rows import RowStore, order_rows

HELD_OUT = 0.05


def corpus_texts(
    spec: DataSpec, where: str, base_dir: Path, cache_dir: Path
) -> tuple[Iterator[str], Iterator[str], int]:
    """Return a corpus in constant memory: texts to train a tokenizer on, held-out texts, and the bytes of both.

    `validationSplit` (0.05 if it is 0) is held out; a single text is used for both.

    Args:
        where: the spec's path, such as `stages[0].tokenizer.data`.

    Raises:
        UserError: the data can't be read or has no texts.
    """
    store = open_table(spec, "text", where, cache_dir, base_dir, lambda message: None)
    share = spec.validation_split or HELD_OUT
    if len(store) < 2:
        only = np.arange(len(store))
        return _texts(store, only), _texts(store, only), store.bytes
    train, held = order_rows(len(store), spec.model_copy(update={"validation_split": share}), where)
    return _texts(store, train), _texts(store, held), int(store.sizes(np.concatenate([train, held])).sum())


def _texts(store: RowStore, indices: NDArray[np.int64]) -> Iterator[str]:
    return (store[int(index)]["text"] for index in indices)


def eval_prompts(stage: TrainingSpec, base_dir: Path, cache_dir: Path, n: int) -> list[Prompt]:
    """Return the first `n` held-out rows (training rows if none are held out) as prompts.

    Each has `messages` (a conversation) or `prompt` (plain text), and `reference`, the data's continuation. The prompt
    of a text is its first 32 words; that of a conversation is all before its last assistant turn. Streaming data has
    no prompts.
    """
    if stage.data.streaming and stage.eval_data is None:
        return []
    spec = stage.eval_data or stage.data
    where = "evalData" if stage.eval_data else "data"
    store = open_table(spec, stage.row_kind, where, cache_dir, base_dir, lambda message: None)
    train, held = order_rows(len(store), spec, where)
    indices = train if stage.eval_data or not len(held) else held
    found = (prompt_of(store[int(index)]) for index in indices)
    return [prompt for prompt, _ in zip((one for one in found if one), range(n), strict=False)]
