"""Between two stages in one process: free the last one's memory and reset what the libraries keep of it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from inspect import getclosurevars
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def release(trainer: Any) -> None:
    """Free the models, master weights and optimizer states of a finished stage, the reference model's included.

    DeepSpeed's gradient hooks refer to the optimizer from C++, where Python's garbage collector does not see them
    (DeepSpeed#4856, transformers#28178), so each engine is destroyed explicitly.
    """
    for engine in _engines(trainer):
        engine.destroy()
    trainer.accelerator.free_memory()
    vars(trainer).clear()


def forget_stage() -> None:
    """Reset accelerate's and transformers' process-wide state (precision, DeepSpeed's configuration), free memory.

    accelerate sets an environment variable where a stage uses DeepSpeed, and would use it in the next stage too.
    """
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    _clear_zero3()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _engines(trainer: Any) -> Iterator[Any]:
    """DeepSpeed's engines that the trainer holds: its model's and a reference model's."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed import DeepSpeedEngine

    yield from {id(value): value for value in vars(trainer).values() if isinstance(value, DeepSpeedEngine)}.values()


def _clear_zero3() -> None:
    """Clear the two places in DeepSpeed 0.19 where modules of a ZeRO-3 model outlive its engine."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    # An lru_cache of the class, keyed by coordinator and module, inside a decorator that has no __wrapped__.
    decorated = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    getclosurevars(decorated).nonlocals["func"].cache_clear()
