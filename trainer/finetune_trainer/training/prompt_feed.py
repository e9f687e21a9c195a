"""Divides prompts among workers and steps as `batches` does for rows, with equally many prompts on every worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.training.batches import Collator, Division, Feed, StepLoader, StepSampler


class EvenDivision(Division):
    """A division with equally many rows on every worker in each forward pass, as TRL gathers completions in lock-step.

    If rows are not divisible by the world size, the last workers repeat some; `counted` returns which rows count.
    """

    def counted(self, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return this worker's rows in a step of `rows` rows, and whether they count.

        Returns:
            for each forward pass, a unique number of each row, int64 [n], and whether the row counts, bool [n]. The
            numbers of rows that count are those of `share`.
        """
        passes = self.passes(rows)
        bounds = [number * rows // passes for number in range(passes + 1)]
        parts = [(start, end - start, self._positions(end - start)) for start, end in pairwise(bounds)]
        return [(start + positions, positions < size) for start, size, positions in parts]

    def _part(self, start: int, size: int) -> torch.Tensor:
        return start + self._positions(size) % size

    def _positions(self, size: int) -> torch.Tensor:
        each = math.ceil(size / self.workers)
        return torch.arange(self.rank * each, (self.rank + 1) * each)


class FullSteps(StepSampler):
    """A sampler whose steps all have the full number of rows: the last step of an epoch repeats rows of its beginning.

    Args:
        length: rows in the data.
        division: division of a step's rows.
        seed: seed of the order of rows.
        repeats: number of times that each step is repeated, for several optimizer steps on one batch of completions.
    """

    def __init__(self, length: int, division: Division, seed: int, repeats: int = 1) -> None:
        super().__init__(length, division, seed)
        self.repeats = repeats

    @property
    def steps(self) -> int:
        """Steps per epoch, without repetitions."""
        return math.ceil(self.length / self.division.rows)

    def __len__(self) -> int:
        return self.steps * self.division.accumulation * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        share = self.division.share(self.division.rows)
        for step in range(self.steps):
            for _ in range(self.repeats):
                for positions in share:
                    yield order[(step * self.division.rows + positions) % self.length].tolist()


class PromptFeed(Feed):
    """Yields indices of prompts instead of rows: the trainer reads the rows when it generates completions.

    Args:
        division: division of a step's rows.
        seed: seed of the order of rows.
        repeats: optimizer steps on the completions of one batch of prompts.
        checkpoint: directory of the checkpoint from which the stage resumes.
    """

    def __init__(self, division: EvenDivision, seed: int, repeats: int, checkpoint: Path | None = None) -> None:
        super().__init__(division, division.workers, seed, checkpoint=checkpoint)
        self.even, self.repeats = division, repeats
        self.keep: Callable[[int, Path], None] = _nothing
        """Writes further files into a checkpoint, given its step and directory."""

    def loader(self, rows: Any, collator: Collator, **options: Any) -> StepLoader:
        """Return a data loader of batches of indices into `rows`."""
        sampler = FullSteps(len(rows), self.division, self.seed, self.repeats)
        return StepLoader(range(len(rows)), batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def rows_of(self, step: int, length: int | None, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the numbers of the rows of one optimizer step; see `Feed`. Every step has the full number of rows."""
        assert length is not None
        epoch, at = divmod(step // self.repeats, math.ceil(length / self.division.rows))
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed + epoch))
        positions = torch.arange(self.division.rows)
        if rank is not None:
            positions = replace(self.division, rank=rank).share(self.division.rows)[number]
        return [int(row) for row in order[(at * self.division.rows + positions) % length]]

    def save(self, step: int, directory: Path) -> None:
        self.keep(step, directory)


def _nothing(step: int, directory: Path) -> None:
    """Write no further files."""
