"""Memory of inference: weights, the KV cache of completions, logits of texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from finetune_api.problems import Problem
from finetune_api.stages import EvaluateSpec
from finetune_api.stages.evaluation import PERPLEXITY
from finetune_api.training import Quantization
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import context_length
from finetune_trainer.plan.activations import key_value_bytes, layer_activations
from finetune_trainer.plan.memory import CONTEXT, Memory, Workload
from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.plan.states import MASTER, weight_bytes

MOST_TOKENS = 8192
"""Maximum tokens of a forward pass over texts, with padding, to bound the logits; a longer text is passed alone."""


@dataclass(frozen=True)
class Reading:
    """Inference workload: settings that its memory depends on."""

    batch: int
    """Rows per batch and worker."""
    length: int
    """Tokens per row, completion included."""
    dtype_bytes: int
    kind: str
    """`cuda` or `cpu`."""
    scores_texts: bool
    """Whether logits of whole texts are computed (perplexity)."""
    generates: bool
    quantization: Quantization | None = None


def inference_memory(size: ModelSize, load: Reading) -> Memory:
    """Return the peak memory of one worker, which loads the whole model."""
    work = _workload(load)
    read = max(min(MOST_TOKENS, load.batch * load.length), load.length)
    tokens = max(read if load.scores_texts else 0, load.batch * load.length if load.generates else 0)
    return Memory(
        weights=weight_bytes(size, work),
        gradients=0,
        optimizer=0,
        activations=round(tokens * layer_activations(size, work)),
        loss=_logits(size, load, read),
        reference=0,
        buffers=load.batch * key_value_bytes(size, load.length, load.dtype_bytes) if load.generates else 0,
        context=CONTEXT[load.kind],
    )


def reading(spec: EvaluateSpec, length: int, dtype_bytes: int, kind: str) -> Reading:
    """Return the workload of an evaluation on rows of `length` tokens."""
    return Reading(
        batch=spec.per_device_eval_batch_size,
        length=length,
        dtype_bytes=dtype_bytes,
        kind=kind,
        scores_texts=PERPLEXITY in spec.metrics or bool(spec.tasks),
        generates=spec.generates,
        quantization=spec.quantization,
    )


def reading_faults(spec: EvaluateSpec, config: PretrainedConfig, path: str) -> Iterator[Problem]:
    """Yield the reasons why a model cannot be evaluated."""
    if _fills_masks(config):
        yield Problem(path, f"a {config.model_type} model fills masks: it has no perplexity and answers nothing")
    context, most = context_length(config), spec.generation.max_new_tokens
    if spec.generates and context is not None and most >= context:
        message = f"got {most}, but the model's context is {context} tokens, prompt included"
        yield Problem(f"{path}.generation.maxNewTokens", message)


def reading_length(spec: EvaluateSpec, config: PretrainedConfig, longest: int | None) -> int:
    """Return the tokens of the longest row with its completion if known, else the model's context length."""
    context = context_length(config)
    answer = spec.generation.max_new_tokens if spec.generates else 0
    wanted = context or 1024 if longest is None else longest + answer
    return min(wanted, context or wanted)


def reading_advice(size: ModelSize, load: Reading, path: str, limit: int) -> Iterator[str]:
    """Yield the cheapest change of settings after which the models fit in `limit` bytes."""
    if (fitting := smaller_batch(size, load, limit)) is not None:
        yield f"{path}.perDeviceEvalBatchSize: {fitting}"
        return
    small = replace(load, batch=1, quantization=Quantization())
    if load.quantization is None and (total := inference_memory(size, small).total) <= limit:
        yield f"{path}.quantization: {{}} and perDeviceEvalBatchSize: 1 take {human_bytes(total)}"
        return
    yield "each worker holds the whole model: evaluate it on a larger device"


def check_reading(spec: EvaluateSpec, config: PretrainedConfig, path: str) -> None:
    """Raise UserError with all problems that `reading_faults` yields."""
    found = list(reading_faults(spec, config, path))
    if found:
        raise UserError(found)


def smaller_batch(size: ModelSize, load: Reading, limit: int) -> str | None:
    """Halve the batch until it fits in `limit` bytes; return its size and memory as text, or None if none fits."""
    batch = load.batch
    while batch > 1:
        batch //= 2
        if (total := inference_memory(size, replace(load, batch=batch)).total) <= limit:
            return f"{batch} takes {human_bytes(total)}"
    return None


def _workload(load: Reading) -> Workload:
    """Return the equivalent training workload: a frozen model with an empty adapter."""
    quantization = load.quantization
    return Workload(
        batch=load.batch,
        length=load.length,
        dtype_bytes=load.dtype_bytes,
        adapter=AdapterSize(0, 0, 0),
        quantized_bits=None if quantization is None else quantization.bits,
        double_quant=quantization is None or quantization.double_quant,
        kind=load.kind,
    )


def _logits(size: ModelSize, load: Reading, tokens: int) -> int:
    """Return the bytes of logits: of one token when generating; of all tokens of a pass when scoring texts.

    A text's logits and their log-softmax are in float32, one text at a time.
    """
    texts = size.vocab * (tokens * load.dtype_bytes + 2 * load.length * MASTER) if load.scores_texts else 0
    return max(texts, load.batch * size.vocab * 2 * MASTER if load.generates else 0)


def _fills_masks(config: PretrainedConfig) -> bool:
    family, saved = str(config.model_type), " ".join(config.architectures or [])
    if family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or ("CausalLM" not in saved and "LMHead" not in saved)
