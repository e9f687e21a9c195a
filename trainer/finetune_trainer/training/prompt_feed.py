"""Which prompts a worker answers at which step: as `batches`, but with as many prompts on every worker."""

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
    """In each forward pass every worker has the same number of rows, because TRL gathers answers in lock-step.

    Where rows don't divide evenly, the last workers repeat some; `counted` says which, and they must not count.
    """

    def counted(self, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's rows in a step of `rows`: for each forward pass a number of each row's own, int64 [n], and
        whether it counts, bool [n]. The numbers of rows that count are those of `share`."""
        passes = self.passes(rows)
        bounds = [number * rows // passes for number in range(passes + 1)]
        parts = [(start, end - start, self._places(end - start)) for start, end in pairwise(bounds)]
        return [(start + places, places < size) for start, size, places in parts]

    def _part(self, start: int, size: int) -> torch.Tensor:
        return start + self._places(size) % size

    def _places(self, size: int) -> torch.Tensor:
        each = math.ceil(size / self.workers)
        return torch.arange(self.rank * each, (self.rank + 1) * each)


class FullSteps(StepSampler):
    """Every step has all its rows: the last one of a pass over the data is filled up from the pass's beginning.

    Args:
        repeats: how often each step comes, for several optimizer steps on the answers to one batch of prompts.
    """

    def __init__(self, length: int, division: Division, seed: int, repeats: int = 1) -> None:
        super().__init__(length, division, seed)
        self.repeats = repeats

    @property
    def steps(self) -> int:
        """Steps of a pass over the data, repeated ones counted once."""
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
    """Indices of prompts in place of rows: a trainer reads the rows itself when it answers them.

    Args:
        repeats: optimizer steps on the answers to one batch of prompts.
    """

    def __init__(self, division: EvenDivision, seed: int, repeats: int, checkpoint: Path | None = None) -> None:
        super().__init__(division, division.workers, seed, checkpoint=checkpoint)
        self.even, self.repeats = division, repeats
        self.keep: Callable[[int, Path], None] = _nothing
        """Writes what else a checkpoint needs into it, given its step."""

    def loader(self, rows: Any, collator: Collator, **options: Any) -> StepLoader:
        """Batches of indices into `rows`."""
        sampler = FullSteps(len(rows), self.division, self.seed, self.repeats)
        return StepLoader(range(len(rows)), batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def rows_of(self, step: int, length: int | None, rank: int | None = None, number: int = 0) -> list[int]:
        """As of `Feed`; every step has all its rows."""
        assert length is not None
        epoch, at = divmod(step // self.repeats, math.ceil(length / self.division.rows))
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed + epoch))
        places = torch.arange(self.division.rows)
        if rank is not None:
            places = replace(self.division, rank=rank).share(self.division.rows)[number]
        return [int(row) for row in order[(at * self.division.rows + places) % length]]

    def save(self, step: int, directory: Path) -> None:
        self.keep(step, directory)


def _nothing(step: int, directory: Path) -> None:
    """No more than any checkpoint has."""
