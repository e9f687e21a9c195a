"""Sample of a stage's training data for measuring expert scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from finetune_trainer.data import StreamedRows
from finetune_trainer.esft.scores import Batch


def sample_batches(rows: Any, tokens: int, batch_size: int, seed: int) -> list[Batch]:
    """Return batches of whole examples with at least `tokens` tokens in total, or all examples if they have fewer.

    The batches do not depend on the world size, so neither do the scores. `share` divides them among the workers.

    Args:
        rows: prepared training rows, packed or not. A stream is read from its start; its own position does not change.

    Returns:
        `input_ids` and `attention_mask` of each batch, int64 [B, T].
    """
    examples: list[torch.Tensor] = []
    left = tokens
    for example in _examples(rows, seed):
        examples.append(example)
        left -= len(example)
        if left <= 0:
            break
    examples.sort(key=len)
    return [_padded(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]


def share(batches: list[Batch], rank: int, workers: int, *, in_step: bool) -> Iterator[Batch]:
    """Yield the batches of one worker.

    Args:
        in_step: yield equally many batches on every worker, as ZeRO-3's collectives require; fill up with padding.
    """
    mine = batches[rank::workers]
    yield from mine
    if in_step and len(mine) * workers < len(batches):
        idle = batches[0]["input_ids"][:1]
        yield {"input_ids": idle, "attention_mask": torch.zeros_like(idle)}


def _examples(rows: Any, seed: int) -> Iterator[torch.Tensor]:
    for row in _in_order(rows, seed):
        ids: Any = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        lengths = row.get("seq_lengths")
        yield from ids.split([int(length) for length in lengths]) if lengths is not None else [ids]


def _in_order(rows: Any, seed: int) -> Iterator[dict[str, Any]]:
    if isinstance(rows, StreamedRows):
        yield from rows.shard(0, 1)
        return
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    yield from (rows[int(index)] for index in order)


def _padded(examples: list[torch.Tensor]) -> Batch:
    lengths = torch.tensor([len(example) for example in examples])
    ids = pad_sequence(examples, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
