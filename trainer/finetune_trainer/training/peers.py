"""Small agreements among the workers of a stage, over gloo, so that they never wait for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.pulse import during

PATIENCE = timedelta(days=30)
"""One worker may have hours of work that the others wait for; a worker that is lost breaks the connection at once."""


class Peers:
    """The workers of one stage. With one worker every agreement is its own word."""

    def __init__(self) -> None:
        self.many = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.many else None

    def sum(self, values: Sequence[int]) -> list[int]:
        """Element-wise sum over the workers; every worker gets it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def most(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over the workers; every worker gets it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any worker says so."""
        return bool(self.most([int(flag)])[0])

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's numbers (as many on each), in order of the workers; every worker gets them."""
        if not self.many:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        with _waiting("the numbers"):
            dist.all_gather(found, mine, group=self._group)
        return [one.tolist() for one in found]

    def collect(self, value: Any) -> list[Any]:
        """Every worker's value, in order of the workers; every worker gets them."""
        if not self.many:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        with _waiting("the values"):
            dist.all_gather_object(found, value, group=self._group)
        return found

    def wait(self) -> None:
        """Until every worker is here."""
        if self.many:
            with _waiting("the arrival"):
                dist.barrier(group=self._group)

    def _reduce(self, values: Sequence[int], operation: dist.ReduceOp) -> list[int]:
        if not self.many:
            return [int(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.int64)
        with _waiting("the counts"):
            dist.all_reduce(tensor, op=operation, group=self._group)
        return [int(value) for value in tensor]


def _waiting(what: str) -> AbstractContextManager[None]:
    return during(f"waiting for {what} of the other workers", measured=True, waits=True)
