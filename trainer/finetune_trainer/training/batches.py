"""Which rows each worker trains on at which step: the same rows at each step, however many workers there are."""

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
"""In a checkpoint: where a shard of the stream stands."""
Row = dict[str, Any]
Collator = Callable[[list[Row]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Division:
    """How the rows of each optimizer step are divided into forward passes and among the workers.

    `rows` (the global batch) belongs to the stage and not to its workers: with fewer of them each makes more forward
    passes. In every pass every worker has at least one row, since gradients are reduced in lock-step; where there are
    fewer rows than workers, rows are repeated.
    """

    rows: int
    """Rows per optimizer step, all workers together."""
    most: int
    """Most rows per worker and forward pass."""
    workers: int
    rank: int

    @property
    def accumulation(self) -> int:
        """Forward passes per worker in a full step."""
        return self.passes(self.rows)

    def passes(self, rows: int) -> int:
        """Forward passes per worker in a step of so many rows."""
        return math.ceil(rows / (self.most * self.workers))

    def share(self, rows: int) -> list[torch.Tensor]:
        """This worker's rows in a step of `rows`: for each forward pass their positions in the step, int64, ascending.

        Full steps are divided as accelerate deals out batches: pass by pass, worker by worker.
        """
        passes = self.passes(rows)
        bounds = [number * rows // passes for number in range(passes + 1)]
        return [self._part(start, end - start) for start, end in pairwise(bounds)]

    def owner(self, position: int, rows: int) -> int:
        """The worker whose row a position in a step is."""
        passes = self.passes(rows)
        number = ((position + 1) * passes - 1) // rows
        start, end = number * rows // passes, (number + 1) * rows // passes
        return ((position - start + 1) * self.workers - 1) // (end - start)

    def _part(self, start: int, size: int) -> torch.Tensor:
        first, last = self.rank * size // self.workers, (self.rank + 1) * size // self.workers
        mine = torch.arange(first, last) if last > first else torch.tensor([self.rank % size])
        return start + mine


class StepSampler(BatchSampler):
    """Indices into rows at hand, for each forward pass of one worker, pass after pass over the data.

    The order is that of accelerate's SeedableRandomSampler. The last step of a pass over the data is smaller. Skipping
    batches, as a resumed run does, reads no rows.
    """

    def __init__(self, length: int, division: Division, seed: int) -> None:
        self.length, self.division, self.seed = length, division, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the data that the next iteration draws."""
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
    """The rows of one worker's forward passes from a stream, step after step without end.

    The stream is read in `shards`, as many as there are workers when a stage begins, and each gives the same number of
    rows to each step. With other workers a worker reads several shards, or takes some rows of one and leaves the others
    to the worker beside it, so that each step has the same rows again.

    Args:
        first: the step to begin after.
        states: reads a shard's state after step `first`; not called for 0. None begins with the stream's first row.
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
            anew = reader.state_dict() | {"rows": first * self._rows_per_shard}
            reader.load_state_dict(anew if states is None else states(shard))

    def states(self, step: int) -> dict[int, dict[str, Any]]:
        """The state after a step of each shard that this worker answers for."""
        mine = [shard for shard in self.readers if self._answers_for(shard)]
        return {shard: self.readers[shard].state_at(step * self._rows_per_shard) for shard in mine}

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

    def _place(self, position: int) -> tuple[int, int]:
        """The shard that a position in a step is read from, and the number of the row among that shard's."""
        number, rest = divmod(position, self.most * self.shards)
        return rest // self.most, number * self.most + rest % self.most

    def _touched(self) -> list[int]:
        return sorted({self._place(position)[0] for positions in self.share for position in positions})

    def _answers_for(self, shard: int) -> bool:
        return self.division.owner(shard * self.most, self.division.rows) == self.division.rank

    def _take(self, position: int, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> Row:
        shard, number = self._place(position)
        self._draw(shard, number + 1, rows, drawn)
        return drawn[shard][number]

    def _finish(self, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> None:
        """Leave the step's remaining rows to the workers whose they are."""
        for shard in self.readers:
            self._draw(shard, self._rows_per_shard, rows, drawn)

    def _draw(self, shard: int, count: int, rows: dict[int, Iterator[Row]], drawn: dict[int, list[Row]]) -> None:
        while len(drawn[shard]) < count:
            drawn[shard].append(next(rows[shard]))


class StepLoader(DataLoader[Any]):
    """Batches of a `StepSampler` or of `StreamSteps`, not divided any further."""

    def set_epoch(self, epoch: int) -> None:
        """transformers' hook at the beginning of a pass over the data."""
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


class Feed:
    """Where a stage's training rows come from, and where a resumed stage goes on.

    Args:
        shards: workers when the stage began: in so many shards a stream is read.
        step: the step after which the stage goes on.
        checkpoint: the directory it goes on from; None at the beginning, and where a stream is read anew.
    """

    def __init__(
        self, division: Division, shards: int, seed: int, step: int = 0, checkpoint: Path | None = None
    ) -> None:
        self.division, self.shards, self.seed, self.step, self.checkpoint = division, shards, seed, step, checkpoint
        self.stream: StreamSteps | None = None

    def loader(self, rows: Any, collator: Collator, **options: Any) -> StepLoader:
        """What to train on: `rows` is a dataset with a length, or a stream."""
        if not isinstance(rows, StreamedRows):
            sampler = StepSampler(len(rows), self.division, self.seed)
            return StepLoader(rows, batch_sampler=sampler, collate_fn=collator, **options)
        states = None if self.checkpoint is None else self._state
        self.stream = StreamSteps(rows, self.shards, self.division, self.step, states)
        # A generator of its own: a DataLoader draws a seed from the global one whenever it begins, and a resumed run
        # begins where an undisturbed one does not.
        own = torch.Generator()
        return StepLoader(self.stream, batch_size=None, collate_fn=collator, generator=own, **options)

    def rows_of(self, step: int, length: int | None, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the numbers of the rows of the step after `step` steps, in the order in which they are trained on.

        Args:
            length: rows in the data; None for a stream, whose rows are counted in the order of its steps.
            rank: a worker, to get its rows of forward pass `number` alone, both counted from 0.
        """
        if length is None:
            order, start, rows = None, step * self.division.rows, self.division.rows
        else:
            epoch, at = divmod(step, math.ceil(length / self.division.rows))
            order = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed + epoch))
            start, rows = at * self.division.rows, min(self.division.rows, length - at * self.division.rows)
        places = torch.arange(rows)
        if rank is not None:
            places = replace(self.division, rank=rank).share(rows)[number]
        found = start + places if order is None else order[(start + places) % len(order)]
        return [int(row) for row in found]

    def save(self, step: int, directory: Path) -> None:
        """Write into a checkpoint where the stream stands after a step; nothing for a dataset with a length."""
        for shard, state in (self.stream.states(step) if self.stream else {}).items():
            (directory / STREAM_STATE.format(shard)).write_text(json.dumps(state))

    def _state(self, shard: int) -> dict[str, Any]:
        assert self.checkpoint is not None
        return dict(json.loads((self.checkpoint / STREAM_STATE.format(shard)).read_text()))
