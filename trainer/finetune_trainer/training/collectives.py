"""Small agreements among the workers of a stage, over gloo, so that they never wait for a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.errors import NotMet
from finetune_trainer.heartbeat import during

PATIENCE = timedelta(days=30)
"""One worker may have hours of work that the others wait for; a worker that is lost breaks the connection at once."""


_MISSING = re.compile(r"Ranks? ([\d, ]+?) failed to pass monitoredBarrier")
"""Which ranks the first one names when a monitored barrier's time is over (`ProcessGroupGloo.cpp`)."""
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)
"""The others only say that the first one, which answers them, has not."""


def missing_ranks(words: str) -> list[int]:
    """Return the ranks that a monitored barrier's error says did not come in time; none where it broke otherwise."""
    found = _MISSING.search(words)
    if found is not None:
        return [int(rank) for rank in found[1].replace(",", " ").split()]
    return [0] if "reached monitoredBarrier" in words and _LATE.search(words) else []


class Peers:
    """The workers of one stage. With one worker every agreement is its own word.

    Args:
        node: name of this worker's node.
        loading: seconds that `meet` waits.
    """

    def __init__(self, node: str = "", loading: float = PATIENCE.total_seconds()) -> None:
        self.many = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.many else None
        self._loading = timedelta(seconds=loading)
        # Others than the first worker wait as long as their group says, whatever the barrier's own limit.
        self._loads = dist.new_group(backend="gloo", timeout=self._loading) if self.many else None
        self._nodes: list[str] = self.collect(node)

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

    def meet(self, what: str) -> None:
        """Wait until every worker has come this far, before the first collective operation with a time limit.

        Args:
            what: was done by those that are here, such as `the model is loaded`.

        Raises:
            NotMet: some are missing after the time that loading may take; the error names them and their nodes.
        """
        if not self.many:
            return
        try:
            with _waiting("the arrival"):
                dist.monitored_barrier(group=self._loads, timeout=self._loading, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._not_met(what, error) from error

    def _not_met(self, what: str, error: RuntimeError) -> Exception:
        """Name the missing workers; where the connection broke instead, the error stays what it is."""
        missing = missing_ranks(str(error))
        if not missing:
            return error
        names = ", ".join(f"{rank} (node {self._nodes[rank]})" for rank in missing)
        return NotMet(
            f"worker{'s' if len(missing) > 1 else ''} {names} of {len(self._nodes)} did not get so far that {what} "
            f"within runPolicy.loadingTimeoutSeconds ({self._loading.total_seconds():.0f} s): raise it where the "
            "download is slow, or look into the log of that node"
        )

    def _reduce(self, values: Sequence[int], operation: dist.ReduceOp) -> list[int]:
        if not self.many:
            return [int(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.int64)
        with _waiting("the counts"):
            dist.all_reduce(tensor, op=operation, group=self._group)
        return [int(value) for value in tensor]


def _waiting(what: str) -> AbstractContextManager[None]:
    return during(f"waiting for {what} of the other workers", measured=True, waits=True)
