"""Frees the memory of a finished stage and resets the libraries' global state, before the next stage begins."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from inspect import getclosurevars
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def release(trainer: Any) -> None:
    """Free the models, master weights and optimizer states of a finished stage, including its reference model.

    DeepSpeed's gradient hooks refer to the optimizer from C++, which Python's garbage collector does not see
    (DeepSpeed#4856, transformers#28178), so each engine is destroyed explicitly.
    """
    for engine in _engines(trainer):
        engine.destroy()
    trainer.accelerator.free_memory()
    vars(trainer).clear()


def reset_stage_state() -> None:
    """Reset the global state of accelerate and transformers (precision, DeepSpeed's configuration) and free memory.

    accelerate sets an environment variable if a stage uses DeepSpeed, and would use DeepSpeed in the next stage too.
    """
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # transformers has no types here
    _clear_zero3()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _engines(trainer: Any) -> Iterator[Any]:
    """Yield the DeepSpeed engines of a trainer: those of its model and of a reference model."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed import DeepSpeedEngine

    yield from {id(value): value for value in vars(trainer).values() if isinstance(value, DeepSpeedEngine)}.values()


def _clear_zero3() -> None:
    """Clear the two global variables of DeepSpeed 0.19 in which modules of a ZeRO-3 model outlive its engine."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    # An lru_cache of a method, keyed by coordinator and module, inside a decorator without __wrapped__.
    decorated = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    getclosurevars(decorated).nonlocals["func"].cache_clear()
