"""Whether vLLM generates the answers of an `rlhf` stage, why, and which share of the GPU it takes.

vLLM runs in the worker's own process (TRL's `colocate` mode), so it must be built for the same torch. The plan and the
worker ask the same functions, so what is planned is what is set.
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
"""Tokens of the pass by which vLLM measures its working memory: TRL's `max_num_batched_tokens`."""


@dataclass(frozen=True)
class Engine:
    """What generates the answers."""

    vllm: bool
    why: str
    """One sentence for the plan."""


def choose_engine(run: RunConfig, index: int, kind: str, found: str | None) -> Engine:
    """Return what generates the answers of a stage. The same job in the same image always gets the same engine.

    Args:
        index: of an `rlhf` stage.
        kind: `cuda` or `cpu`.
        found: the installed version of vLLM, or None.

    Raises:
        UserError: vLLM would be used, but is of a version that was not made for this torch.
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
    """Return why vLLM is not used, or None. The order is fixed: what the job says, the device, the image."""
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
    """Return why vLLM can't load the model that the stage starts from, which it reads from disk by itself."""
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
    """Return the bytes of one worker's vLLM.

    These are its copy of the weights, the keys and values of the completions of one forward pass at their maximum length,
    and the working memory of its profiling pass (no gradients).
    vLLM queues answers for which there is no room, so further answers of a step cost time and not memory.

    Args:
        load: `drawn` answers of `length` tokens, prompt included.
    """
    weights = size.total * load.dtype_bytes
    width = 4 * size.hidden + 3 * max(size.intermediate, size.expert_intermediate * size.experts_per_token)
    logits = 3 * MASTER * load.drawn * size.vocab  # float32: as given, sorted, and their probabilities
    working = PROFILED_TOKENS * width * load.dtype_bytes + logits
    return weights + load.drawn * key_value_bytes(size, load.length, load.dtype_bytes) + working + CONTEXT["cuda"]


def utilization(bytes_: int, device_bytes: int) -> float:
    """Return vLLM's `gpu_memory_utilization` for so many bytes: a share of the whole device, rounded up to 0.001."""
    return min(math.ceil(1000 * bytes_ / device_bytes) / 1000, 1.0)
