"""Collective operations on small values among the workers of a stage, over gloo, so that none waits for a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.errors import WorkersMissing
from finetune_trainer.heartbeat import in_phase

TIMEOUT = timedelta(days=30)
"""Other workers may wait for hours while one works. A lost worker breaks the connection at once, without a timeout."""
_MISSING = re.compile(r"Ranks? ([\d, ]+?) failed to pass monitoredBarrier")
"""The ranks in the error of rank 0 after a monitored barrier's timeout (`ProcessGroupGloo.cpp`)."""
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
"""The error of the other ranks says only that rank 0 did not reply in time."""


def missing_ranks(message: str) -> list[int]:
    """Return the ranks that a monitored barrier's error names as missing; none if it failed for another reason."""
    found = _MISSING.search(message)
    if found is not None:
        return [int(rank) for rank in found[1].replace(",", " ").split()]
    return [0] if "reached monitoredBarrier" in message and _TIMED_OUT.search(message) else []


class Collectives:
    """Collective operations of the workers of one stage. With one worker each returns that worker's own value.

    Args:
        node: name of this worker's node.
        loading: timeout of `rendezvous` in seconds.
    """

    def __init__(self, node: str = "", loading: float = TIMEOUT.total_seconds()) -> None:
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.distributed else None
        self._loading = timedelta(seconds=loading)
        # Ranks other than 0 wait for the timeout of their group and ignore the timeout of the barrier.
        self._loading_group = dist.new_group(backend="gloo", timeout=self._loading) if self.distributed else None
        self._nodes: list[str] = self.gather(node)

    def sum(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise sum over all workers, on every worker."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum over all workers, on every worker."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any worker."""
        return bool(self.max([int(flag)])[0])

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers of every worker in order of rank, on every worker. All must pass equally many."""
        if not self.distributed:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        with _waiting("the numbers"):
            dist.all_gather(gathered, own, group=self._group)
        return [numbers.tolist() for numbers in gathered]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every worker in order of rank, on every worker. Values must be picklable."""
        if not self.distributed:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        with _waiting("the values"):
            dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def barrier(self) -> None:
        """Wait until every worker calls this."""
        if self.distributed:
            with _waiting("the arrival"):
                dist.barrier(group=self._group)

    def rendezvous(self, condition: str) -> None:
        """Wait until every worker calls this, before the first collective operation with a timeout.

        Args:
            condition: what holds for a worker that has arrived, such as `its model is loaded`; used in the error.

        Raises:
            WorkersMissing: some workers did not arrive within the loading timeout; the error names them and their
                nodes.
        """
        if not self.distributed:
            return
        try:
            with _waiting("the arrival"):
                dist.monitored_barrier(group=self._loading_group, timeout=self._loading, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._missing_workers(condition, error) from error

    def _missing_workers(self, condition: str, error: RuntimeError) -> Exception:
        """Return an error that names the missing workers, or the error itself if the connection broke instead."""
        missing = missing_ranks(str(error))
        if not missing:
            return error
        names = ", ".join(f"{rank} (node {self._nodes[rank]})" for rank in missing)
        return WorkersMissing(
            f"worker{'s' if len(missing) > 1 else ''} {names} of {len(self._nodes)} did not get so far that "
            f"{condition} within runPolicy.loadingTimeoutSeconds ({self._loading.total_seconds():.0f} s): raise it if "
            "the download is slow, or look into the log of that node"
        )

    def _reduce(self, values: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if not self.distributed:
            return [int(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.int64)
        with _waiting("the counts"):
            dist.all_reduce(tensor, op=operation, group=self._group)
        return [int(value) for value in tensor]


def _waiting(what: str) -> AbstractContextManager[None]:
    return in_phase(f"waiting for {what} of the other workers", measured=True, waits=True)
