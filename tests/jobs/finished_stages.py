"""Train small stages one after the other in this process, and print what remains in memory after each.

It is a process of its own because importing DeepSpeed changes the process.
Usage: python finished_stages.py DIRECTORY STAGES.json, where STAGES is a list of [job, ZeRO stage].
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.jobs.in_process import open_stage
from transformers import PrinterCallback

from finetune_trainer.stages import make_trainer
from finetune_trainer.training.deepspeed import join_process_group
from finetune_trainer.training.reset_state import release, reset_stage_state


def parts(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield what must be freed after a stage: its models, and every tensor of its optimizer."""
    yield "model", trainer.model
    if getattr(trainer, "ref_model", None) is not None:
        yield "reference", getattr(trainer.ref_model, "module", trainer.ref_model)
    optimizer = trainer.optimizer
    while optimizer is not None:
        yield "optimizer", optimizer
        for group in optimizer.param_groups:
            yield from (("master", weight) for weight in group["params"])
        for state in optimizer.state.values():
            yield from (("moment", value) for value in state.values() if isinstance(value, torch.Tensor))
        optimizer = getattr(optimizer, "optimizer", None)


def train(job: dict[str, Any], directory: Path, zero: int) -> list[tuple[str, weakref.ref[Any]]]:
    """Train the job's stage, release it, and return weak references to its parts."""
    join_process_group(zero, accelerator=False)
    trainer = make_trainer(open_stage(job, directory, zero))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if "accumulate" in job["metadata"]["name"]:
        assert trainer.optimizer.optimizer.gradient_accumulation_dtype == torch.float32
    found = [(name, weakref.ref(part)) for name, part in parts(trainer)]
    release(trainer)
    return found


def tensor_bytes() -> int:
    """Return the bytes of all tensors in this process."""
    storages = [one.untyped_storage() for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def alive(found: list[tuple[str, weakref.ref[Any]]]) -> list[str]:
    """Return the names of the parts that are still alive."""
    gc.collect()
    return sorted({name for name, part in found if part() is not None})


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
    for job, zero in json.loads(Path(sys.argv[2]).read_text()):
        references = train(job, Path(sys.argv[1]), zero)
        reset_stage_state()
        print("ALIVE", json.dumps([len(references), alive(references), tensor_bytes()]), flush=True)
