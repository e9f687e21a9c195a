"""Between two stages in one process: let go of the last one's model and of what the libraries remember of it."""

from __future__ import annotations

import gc
import os

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def forget_stage() -> None:
    """Reset accelerate's and transformers' process-wide state (precision, DeepSpeed's configuration), free memory.

    accelerate sets an environment variable where a stage uses DeepSpeed, and would use it in the next stage too.
    """
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
