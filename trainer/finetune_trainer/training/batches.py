"""Divides training rows among workers and steps, so that each step has the same rows with any world size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from finetune_trainer.data import StreamedRows

STREAM_STATE = "stream-{}.json"
"""File in a checkpoint with the position in a shard of the stream."""
Row = dict[str, Any]
Collator = Callable[[list[Row]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Division:
    """The division of the rows of each optimizer step into forward passes and among the workers.

    `rows`, the global batch size, is a property of the stage and not of its workers: with fewer workers each makes more
    forward passes. In every pass every worker has at least one row, because gradients are reduced in lock-step; if
    there are fewer rows than workers, rows are repeated.
    """

    rows: int
    """Rows per optimizer step over all workers."""
    most: int
    """Maximum number of rows per worker and forward pass."""
    workers: int
    """World size."""
    rank: int

    @property
    def accumulation(self) -> int:
        """Gradient accumulation steps: forward passes per worker in a full step."""
        return self.passes(self.rows)

    def passes(self, rows: int) -> int:
        """Return the forward passes per worker in a step of `rows` rows."""
        return math.ceil(rows / (self.most * self.workers))

    def share(self, rows: int) -> list[torch.Tensor]:
        """Return this worker's rows in a step of `rows` rows.

        Full steps are divided as accelerate divides batches: pass by pass, worker by worker.

        Returns:
            for each forward pass, the positions of the rows in the step: int64 [n], ascending.
        """
        passes = self.passes(rows)
        bounds = [number * rows // passes for number in range(passes + 1)]
        return [self._part(start, end - start) for start, end in pairwise(bounds)]

    def owner(self, position: int, rows: int) -> int:
        """Return the rank of the worker that has a position in a step."""
        passes = self.passes(rows)
        number = ((position + 1) * passes - 1) // rows
        start, end = number * rows // passes, (number + 1) * rows // passes
        return ((position - start + 1) * self.workers - 1) // (end - start)

    def _part(self, start: int, size: int) -> torch.Tensor:
        first, last = self.rank * size // self.workers, (self.rank + 1) * size // self.workers
        own = torch.arange(first, last) if last > first else torch.tensor([self.rank % size])
        return start + own


class StepSampler(BatchSampler):
    """Yields the row indices of each forward pass of one worker, epoch after epoch.

    The order is that of accelerate's SeedableRandomSampler. The last step of an epoch may be smaller. Skipping batches,
    as a resumed run does, reads no rows.
    """

    def __init__(self, length: int, division: Division, seed: int) -> None:
        self.length, self.division, self.seed = length, division, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.division.rows)
        return full * self.division.accumulation + self.division.passes(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        full = self.division.share(self.division.rows)
        for start in range(0, self.length, self.division.rows):
            rows = min(self.division.rows, self.length - start)
            for positions in full if rows == self.division.rows else self.division.share(rows):
                yield order[start + positions].tolist()


class StreamSteps(IterableDataset[list[Row]]):
    """Yields the rows of one worker's forward passes from a stream, without end.

    The stream is read in `shards`, the world size with which the stage began, and each shard contributes the same
    number of rows to each step. With another world size a worker reads several shards, or shares a shard with another
    worker, so that each step has the same rows as before.

    Args:
        stream: the stream.
        shards: number of shards.
        division: division of a step's rows.
        first: number of steps to skip.
        states: reads the state of a shard after step `first`; not called for 0. None: begin with the first row.
    """

    def __init__(
        self,
        stream: StreamedRows,
        shards: int,
        division: Division,
        first: int = 0,
        states: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        assert division.rows % (shards * division.most) == 0, f"{division} does not fit {shards} shards"
        self.shards, self.division, self.most = shards, division, division.most
        self.share = [positions.tolist() for positions in division.share(division.rows)]
        self.readers = {shard: stream.shard(shard, shards) for shard in self._touched()}
        for shard, reader in self.readers.items() if first else ():
            initial = reader.state_dict() | {"rows": first * self._rows_per_shard}
            reader.load_state_dict(initial if states is None else states(shard))

    def states(self, step: int) -> dict[int, dict[str, Any]]:
        """Return the state after a step of each shard that this worker owns, that is, saves."""
        own = [shard for shard in self.readers if self._owns(shard)]
        return {shard: self.readers[shard].state_at(step * self._rows_per_shard) for shard in own}

    def __iter__(self) -> Iterator[list[Row]]:
        rows = {shard: iter(reader) for shard, reader in self.readers.items()}
        while True:
            drawn: dict[int, list[Row]] = {shard: [] for shard in self.readers}
            for number, positions in enumerate(self.share, 1):
                batch = [self._take(position, rows, drawn) for position in positions]
                if number == len(self.share):
                    self._finish(rows, drawn)
                yield batch

    @property
    def _rows_per_shard(self) -> int:
        return self.division.rows // self.shards

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the shard of a position in a step, and the number of the row among those of the shard in the step."""
        number, rest = divmod(position, self.most * self.shards)
        return rest // self.most, number * self.most + rest % self.most

    def _touched(self) -> list[int]:
        return sorted({self._locate(position)[0] for positions in self.share for position in positions})

    def _owns(self, shard: int) -> bool:
        return self.division.owner(shard * self.most, self.division.rows) == self.division.rank

    def _take(self, position: int, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> Row:
        shard, number = self._locate(position)
        self._draw(shard, number + 1, rows, drawn)
        return drawn[shard][number]

    def _finish(self, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> None:
        """Skip the remaining rows of the step, which belong to other workers."""
        for shard in self.readers:
            self._draw(shard, self._rows_per_shard, rows, drawn)

    def _draw(self, shard: int, count: int, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> None:
        while len(drawn[shard]) < count:
            drawn[shard].append(next(rows[shard]))


class StepLoader(DataLoader[Any]):
    """A data loader of the batches of a `StepSampler` or of `StreamSteps`, which accelerate must not divide further."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. A hook of transformers at the beginning of an epoch."""
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


class Feed:
    """The source of a stage's training rows, which can resume.

    Args:
        division: division of a step's rows.
        shards: number of shards of a stream: the world size with which the stage began.
        seed: seed of the order of rows.
        step: optimizer steps done before.
        checkpoint: directory of the checkpoint from which the stage resumes; None at the beginning, and if a stream is
            read from its start.
    """

    def __init__(
        self, division: Division, shards: int, seed: int, step: int = 0, checkpoint: Path | None = None
    ) -> None:
        self.division, self.shards, self.seed, self.step, self.checkpoint = division, shards, seed, step, checkpoint
        self.stream: StreamSteps | None = None

    def loader(self, rows: Any, collator: Collator, **options: Any) -> StepLoader:
        """Return the data loader for `rows`, a dataset with a length or a stream."""
        if not isinstance(rows, StreamedRows):
            sampler = StepSampler(len(rows), self.division, self.seed)
            return StepLoader(rows, batch_sampler=sampler, collate_fn=collator, **options)
        states = None if self.checkpoint is None else self._state
        self.stream = StreamSteps(rows, self.shards, self.division, self.step, states)
        # A DataLoader draws a seed whenever it begins. From the global generator, that would change the random numbers
        # of a resumed run.
        generator = torch.Generator()
        return StepLoader(self.stream, batch_size=None, collate_fn=collator, generator=generator, **options)

    def rows_of(self, step: int, length: int | None, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the numbers of the rows of one optimizer step, in the order of training.

        Args:
            step: optimizer steps done before.
            length: rows in the data; None for a stream, whose rows are counted in the order of its steps.
            rank: if set, return only the rows of this worker in one forward pass.
            number: the forward pass, from 0.
        """
        if length is None:
            order, start, rows = None, step * self.division.rows, self.division.rows
        else:
            epoch, at = divmod(step, math.ceil(length / self.division.rows))
            order = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed + epoch))
            start, rows = at * self.division.rows, min(self.division.rows, length - at * self.division.rows)
        positions = torch.arange(rows)
        if rank is not None:
            positions = replace(self.division, rank=rank).share(rows)[number]
        numbers = start + positions if order is None else order[(start + positions) % len(order)]
        return [int(row) for row in numbers]

    def save(self, step: int, directory: Path) -> None:
        """Write the position in the stream after a step to a checkpoint; nothing for a dataset with a length."""
        for shard, state in (self.stream.states(step) if self.stream else {}).items():
            (directory / STREAM_STATE.format(shard)).write_text(json.dumps(state))

    def _state(self, shard: int) -> dict[str, Any]:
        assert self.checkpoint is not None
        return dict(json.loads((self.checkpoint / STREAM_STATE.format(shard)).read_text()))
