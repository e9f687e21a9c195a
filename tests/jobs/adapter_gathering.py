"""Train an adapter under ZeRO-3 in this process, save it, and print the bytes that DeepSpeed gathers for saving.

It is a process of its own because importing DeepSpeed changes the process.
Usage: python adapter_gathering.py DIRECTORY JOB.json RANK WORLD_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.jobs.in_process import open_stage
from transformers import PrinterCallback

from finetune_trainer.stages import make_trainer
from finetune_trainer.training.context import Placement
from finetune_trainer.training.deepspeed import join_process_group
from finetune_trainer.training.stage_result import save_result


def watch() -> list[int]:
    """Return a list that collects the bytes of every weight that DeepSpeed gathers from now on."""
    import deepspeed

    gathered: list[int] = []

    class Watched(deepspeed.zero.GatheredParameters):  # type: ignore[misc]
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            params = list(params)
            gathered.extend(one.ds_numel * one.element_size() for one in params if hasattr(one, "ds_numel"))
            super().__init__(params, *args, **kwargs)

    deepspeed.zero.GatheredParameters = Watched
    return gathered


def run(directory: Path, job: dict[str, Any], rank: int, world: int) -> dict[str, int]:
    """Train and save, and return the bytes of the gathered weights, the trained weights and all weights."""
    join_process_group(3, accelerator=False)
    placement = Placement(rank, rank, world, accelerator=False)
    trainer = make_trainer(replace(open_stage(job, directory, 3), placement=placement))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    context = replace(open_stage(job, directory, 3), placement=placement)
    weights = list(trainer.accelerator.unwrap_model(trainer.model_wrapped).parameters())
    sizes = [(one.ds_numel * one.element_size(), one.requires_grad) for one in weights]
    gathered = watch()
    save_result(trainer, context, directory / "result")
    torch.distributed.barrier()
    trained = sum(size for size, trains in sizes if trains)
    return {"gathered": sum(gathered), "trained": trained, "all": sum(size for size, _ in sizes)}


if __name__ == "__main__":
    directory, rank, world = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    rendezvous = f"file://{directory}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    print("BYTES", json.dumps(run(directory, json.loads(Path(sys.argv[2]).read_text()), rank, world)), flush=True)
