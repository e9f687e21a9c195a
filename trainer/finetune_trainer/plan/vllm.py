"""Choose whether vLLM generates the completions of an `rlhf` stage, and its share of the GPU memory.

vLLM runs in the worker's own process (TRL's `colocate` mode), so it must be built for the same torch. Both the plan and
the worker call these functions, so they agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import RlhfSpec
from finetune_trainer.errors import UserError
from finetune_trainer.plan.activations import key_value_bytes
from finetune_trainer.plan.memory import CONTEXT, Workload
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.states import MASTER
from finetune_trainer.plan.vllm_version import REQUIREMENT, TORCH, VERSION, fits_version
from finetune_trainer.stage_graph import place, stage_before

PROFILED_TOKENS = 4096
"""Tokens of vLLM's profiling pass, which measures its working memory: TRL's `max_num_batched_tokens`."""


@dataclass(frozen=True)
class Engine:
    """Engine that generates the completions: vLLM or transformers."""

    vllm: bool
    why: str
    """Reason for the choice, for the plan."""


def choose_engine(run: RunConfig, index: int, kind: str, found: str | None) -> Engine:
    """Return the engine that generates a stage's completions. It depends only on the job, the device and the image.

    Args:
        index: index of an `rlhf` stage.
        kind: device kind, `cuda` or `cpu`.
        found: installed version of vLLM, or None.

    Raises:
        UserError: vLLM would be used, but its installed version is not built for this torch.
    """
    spec = run.job.spec.stages[index].rlhf
    assert spec is not None
    reason = _against(run, index, spec, kind, found)
    if reason is not None or found is None:
        return Engine(False, f"transformers generates the answers: {reason}")
    if not fits_version(found):
        message = f"found vLLM {found}, expected {VERSION}.*, which is built for torch {TORCH}"
        raise UserError([Problem(f"{place(run, index)}.vllm", f"{message}: install '{REQUIREMENT}', or set vllm: off")])
    return Engine(True, f"vLLM {found} generates the answers, beside the model in training")


def _against(run: RunConfig, index: int, spec: RlhfSpec, kind: str, found: str | None) -> str | None:
    """Return the reason not to use vLLM, or None."""
    if spec.vllm == "off":
        return "vllm is off"
    if kind != "cuda":
        return "vLLM needs a GPU"
    if spec.quantization is not None:
        return "vLLM can't take the weights of a quantized model in training"
    if (reason := _unreadable(run, index)) is not None:
        return reason
    return f"vLLM is not installed (`pip install '{REQUIREMENT}'`)" if found is None else None


def _unreadable(run: RunConfig, index: int) -> str | None:
    """Return why vLLM cannot load the stage's starting model, which it reads from disk by itself, or None."""
    model, before = run.job.spec.model, stage_before(run, index)
    if before is None or run.job.spec.stages[before].tokenizer is not None:
        if model.dequantize:
            return "vLLM would load the quantized model, which model.dequantize trains as a copy"
        if model.resize_embeddings == "auto":
            return "vLLM would load the model without the rows that model.resizeEmbeddings adds"
        return None
    esft = run.job.spec.stages[before].esft
    return None if esft is None or esft.merge else "vLLM can't load an expert adapter (esft.merge: false)"


def vllm_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of vLLM on one worker.

    These are its copy of the weights, the KV cache of the completions of one forward pass at their maximum length, and
    the working memory of its profiling pass. vLLM queues further completions, which cost time but no memory.

    Args:
        load: workload with `drawn` completions of `length` tokens, prompt included.
    """
    weights = size.total * load.dtype_bytes
    width = 4 * size.hidden + 3 * max(size.intermediate, size.expert_intermediate * size.experts_per_token)
    logits = 3 * MASTER * load.drawn * size.vocab  # float32: logits, sorted logits, probabilities
    working = PROFILED_TOKENS * width * load.dtype_bytes + logits
    return weights + load.drawn * key_value_bytes(size, load.length, load.dtype_bytes) + working + CONTEXT["cuda"]


def utilization(bytes_: int, device_bytes: int) -> float:
    """Return vLLM's `gpu_memory_utilization` for `bytes_`: a fraction of the device memory, rounded up to 0.001."""
    return min(math.ceil(1000 * bytes_ / device_bytes) / 1000, 1.0)
