"""Two workers of one stage as forks of this process, without Ray: they cost no imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 120


def on_two_workers(work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each of two workers that are joined by gloo.

    Raises:
        AssertionError: a worker raised, with its traceback; or it did not answer.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=_run, args=(rank, port, pairs[rank][1], work), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        return [_answer(pairs[rank][0]) for rank in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(SECONDS), "a worker does not answer"
    fine, value = pipe.recv()
    assert fine, value
    return value


def _run(rank: int, port: int, pipe: Connection, work: Callable[[int], Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        pipe.send((True, work(rank)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise
