"""The last collectives of real processes are read from outside while one of the processes hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.heartbeat import Phase
from finetune_trainer.launch.flight_recorder import Collective, behind, last_collectives, newest
from finetune_trainer.launch.stack_dumps import Stacks
from finetune_trainer.launch.stall_diagnosis import culprit, record
from finetune_trainer.launch.stall_watch import Stall
from finetune_trainer.progress.heartbeats import WorkerHeartbeat

TWO_WORKERS = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from finetune_trainer.launch.flight_recorder import answer_questions
here = Path(sys.argv[1])
rank = 0 if os.fork() else 1
answer_questions(here / f"{rank}.sock")
store = dist.FileStore(str(here / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
second = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
for _ in range(3):
    dist.all_reduce(torch.ones(5, 3))
dist.barrier(group=second)
if rank == 0:
    dist.all_reduce(torch.ones(7, dtype=torch.float64), group=second, async_op=True)
print("ready", rank, flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.timeout(60)
def test_the_last_operation_of_each_group_of_two_workers_one_of_which_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_WORKERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert {process.stdout.readline(), process.stdout.readline()} == {"ready 0\n", "ready 1\n"}
        found = {rank: last_collectives(tmp_path / f"{rank}.sock") for rank in (0, 1)}
        process.stdin.close()
    waiting, *_ = found[0]
    assert waiting.words.startswith(
        "gloo:all_reduce, number 2 of group 1, Double [7]: not finished (scheduled), begun "
    )
    assert [one.words.partition(", begun")[0] for one in found[1]] == [
        "gloo:all_reduce, number 3 of group 0 (default_pg), Float [5, 3]: finished",
        "gloo:barrier, number 1 of group 1, no tensor: finished",
    ]
    assert behind(found) == 1


def test_a_process_that_does_not_answer_has_no_operations(tmp_path: Path) -> None:
    assert last_collectives(tmp_path / "none.sock") == []


def test_an_operation_of_nccl_says_whether_its_kernel_has_started() -> None:
    """NCCL's recorder sets `retired` only after torch's watchdog has seen the end of the operation."""
    entries: list[dict[str, Any]] = [
        nccl(7, state="completed"),
        nccl(8, state="started"),
        nccl(3, group="1", state="completed", is_p2p=True, p2p_seq_id=12, profiling_name="nccl:send 0->1"),
    ]
    first, second = newest(entries, 110)
    assert first.words == (
        "nccl:_allgather_base, number 8 of group 0 (default_pg), BFloat16 [1048576]: not finished (started), "
        "begun 10 s ago"
    )
    assert second.finished and second.words.startswith("nccl:send 0->1, number 12 of group 1 (default_pg)")


def nccl(number: int, group: str = "0", **fields: Any) -> dict[str, Any]:
    return {
        "record_id": number,
        "process_group": [group, "default_pg"],
        "profiling_name": "nccl:_allgather_base",
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "input_sizes": [[1048576]],
        "input_dtypes": ["BFloat16"],
        "retired": False,
        "time_created_ns": 100_000_000_000,
        **fields,
    }


def at(number: int, finished: bool = False, group: str = "0") -> Collective:
    return Collective(group, number, finished, f"operation {number}")


def test_behind_is_the_rank_that_began_fewer_operations_than_one_that_waits() -> None:
    assert behind({0: [at(41)], 1: [at(40, True)], 2: [at(41)]}) == 1
    assert behind({0: [at(41)], 1: [at(41)]}) is None, "all wait in the same operation"
    assert behind({0: [at(41, True)], 1: [at(40, True)]}) is None, "none waits"
    assert behind({0: [at(41)], 1: [at(7, True, "1")]}) is None, "they have no group in common"
    assert behind({}) is None


def test_operations_decide_where_all_workers_are_in_the_same_phase() -> None:
    def beat(rank: int, order: int) -> WorkerHeartbeat:
        return WorkerHeartbeat(rank, 2, 100 + rank, "node", "id", 9, Phase("backward pass", True, False, 4, order))

    found = {0: Stacks("S", "", (at(41),)), 1: Stacks("S", "last collective operation: y", (at(40, True),))}
    same = Stall(60, {0: beat(0, 2), 1: beat(1, 2)}, 2)
    assert same.culprit == 0 and culprit(same, found) == 1
    assert culprit(Stall(60, {0: beat(0, 1), 1: beat(1, 2)}, 2), found) == 0, "its phase says that it is behind"
    assert culprit(same, {0: found[0], 1: Stacks("T", "")}) == 1
    assert "last collective operation: y" in record(same, found)
