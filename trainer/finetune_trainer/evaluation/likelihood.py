"""Compute the negative log-likelihood of rows under a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finetune_trainer.data.encode import IGNORED
from finetune_trainer.evaluation.rows import EvalRow, Piece
from finetune_trainer.plan.inference import MOST_TOKENS


def likelihoods(model: Any, rows: Sequence[EvalRow], pad: int) -> list[tuple[float, int]]:
    """Return the negative log-likelihood in nats of the labeled tokens of each row, and their number.

    Log-probabilities are float32, sums are exact.
    """
    pieces = [(at, piece) for at, row in enumerate(rows) for piece in row.pieces]
    losses: list[list[float]] = [[] for _ in rows]
    for group in _groups(pieces):
        for (at, _), found in zip(group, _losses(model, [piece for _, piece in group], pad), strict=True):
            losses[at] += found
    return [(math.fsum(found), len(found)) for found in losses]


def _groups(pieces: list[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    group: list[tuple[int, Piece]] = []
    longest = 0
    for one in pieces:
        longest = max(longest, len(one[1].ids))
        if group and longest * (len(group) + 1) > MOST_TOKENS:
            yield group
            group, longest = [], len(one[1].ids)
        group.append(one)
    if group:
        yield group


def _losses(model: Any, pieces: list[Piece], pad: int) -> list[list[float]]:
    """Return the loss of each labeled token by piece."""
    longest = max(len(piece.ids) for piece in pieces)
    ids = torch.tensor([piece.ids + [pad] * (longest - len(piece.ids)) for piece in pieces])
    labels = torch.tensor([piece.labels + [IGNORED] * (longest - len(piece.labels)) for piece in pieces])
    mask = torch.tensor([[1] * len(piece.ids) + [0] * (longest - len(piece.ids)) for piece in pieces])
    with torch.no_grad():
        output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        # One piece at a time: a float32 copy of all logits would be the largest thing in memory.
        each = [
            torch.nn.functional.cross_entropy(
                logits[:-1].float(), wanted[1:].to(logits.device), reduction="none", ignore_index=IGNORED
            ).cpu()
            for logits, wanted in zip(output.logits, labels, strict=True)
        ]
    return [loss[wanted[1:] != IGNORED].tolist() for loss, wanted in zip(each, labels, strict=True)]
