"""Two workers of one stage without Ray, forked from a process that has only imported the libraries.

Forks of the test's own process would hang if it has trained before: autograd's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from ray import cloudpickle
from support.cluster.servers import free_port

SECONDS = 120
IMPORTS = ["finetune_trainer.launch.stage_run", "finetune_trainer.stages.sft.stage"]


def on_two_workers(work: Callable[[int], Any]) -> list[Any]:
    """Return what `work(rank)` returns on each of two workers that are joined by gloo.

    Raises:
        AssertionError: a worker raised (with its traceback), or it did not answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    cloudpickle.register_pickle_by_value(sys.modules[work.__module__])  # no worker can import a test's module
    environment = _environment(free_port())
    pairs = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=_run, args=(rank, environment, pairs[rank][1], cloudpickle.dumps(work)), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        return [_answer(pairs[rank][0]) for rank in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _environment(port: int) -> dict[str, str]:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **group}


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(SECONDS), "a worker does not answer"
    fine, value = pipe.recv()
    assert fine, value
    return value


def _run(rank: int, environment: dict[str, str], pipe: Connection, work: bytes) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        pipe.send((True, cloudpickle.loads(work)(rank)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
