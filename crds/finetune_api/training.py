"""Fields that all training stages share, with the names of transformers, PEFT and TRL in camelCase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules
from finetune_api.data import DataSpec
from finetune_api.declaration import TrainingDeclaration, Updates

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Rate = Annotated[float, Field(ge=0, le=1)]
ModuleName = Annotated[str, Field(min_length=1, max_length=256)]
Modules = Annotated[list[ModuleName], Field(min_length=1, max_length=256)]

ALL_LINEAR = "all-linear"

STREAMING_RULE: Json = cel(
    "!self.data.streaming || has(self.maxSteps)", "set maxSteps: the length of streaming data is not known"
)
QUANTIZED_LORA_RULE: Json = cel(
    "!has(self.quantization) || has(self.lora)", "quantization needs lora: quantized weights cannot be trained"
)


class Lora(ApiModel):
    """Train low-rank adapters (PEFT's LoraConfig) instead of all weights."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update matrices."""
    lora_alpha: Annotated[int, Field(ge=1, le=65536)] = 32
    """Scaling of the update: alpha/r, or alpha/sqrt(r) with `useRslora`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    target_modules: Modules = Field(default=[ALL_LINEAR])
    """Names (or suffixes of names) of the modules that get an adapter. `all-linear`: every linear layer except the
    output head and the routers of a mixture of experts."""
    modules_to_save: Modules | None = None
    """Modules that are fully trained in addition to the adapters, such as `embed_tokens`. Default: none."""
    use_rslora: bool = False
    """Rank-stabilized scaling, alpha/sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353)."""
    merge: bool = True
    """true: merge the adapter into the base model at the end of the stage, in the original data type of the base.
    false: keep it as an adapter; the next stage continues to train it."""


class Quantization(ApiModel):
    """Quantize the base weights with bitsandbytes while adapters are trained (QLoRA)."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double_quant: bool = True
    """Quantize the quantization constants of 4-bit weights too."""


class TrainingSpec(TrainingDeclaration):
    """Settings of a training stage: data, optimizer, schedule and checkpoints."""

    model_config = rules(STREAMING_RULE)

    data: DataSpec
    """Training data."""
    eval_data: DataSpec | None = None
    """Evaluation data. Default: the `validationSplit` of `data`, if any."""
    num_train_epochs: Annotated[float, Field(gt=0, le=100000, json_schema_extra={"minimum": 0})] = 1.0
    """Number of epochs. Ignored if `maxSteps` is set."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Default: derived from `numTrainEpochs`."""
    per_device_train_batch_size: PositiveInt = 8
    """Batch size per worker and forward pass."""
    per_device_eval_batch_size: PositiveInt = 8
    """Batch size per worker and forward pass in evaluation."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 2e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warmup."""
    warmup_ratio: Rate = 0.03
    """Fraction of the steps over which the learning rate rises linearly from 0. Ignored if `warmupSteps` is set."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Number of steps over which the learning rate rises linearly from 0. Default: derived from `warmupRatio`."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay. It does not apply to norms and biases."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment."""
    adam_epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """AdamW's epsilon for numerical stability."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Maximum gradient norm for clipping. 0: no clipping."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of initialization, data order and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: needs less memory and about 25% more time."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Data loader processes per worker. 0: the worker loads its batches itself."""
    logging_steps: PositiveInt = 1
    """Steps between two log entries of metrics."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations. Default: evaluate before the first step and at the end only."""
    save_steps: PositiveInt = 500
    """Steps between two checkpoints. The end of the stage saves another one."""
    save_total_limit: PositiveInt = 2
    """Maximum number of complete checkpoints kept per stage. Older ones are deleted."""

    def faults(self) -> Iterator[str]:
        if self.data.streaming and self.max_steps is None:
            yield "set maxSteps: the length of streaming data is not known"


class AdapterSpec(TrainingSpec):
    """Settings of a training stage that can train LoRA adapters."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE)

    lora: Lora | None = None
    """Train LoRA adapters. Default: train all weights."""
    quantization: Quantization | None = None
    """Quantize the base model (QLoRA). Needs `lora`. Default: no quantization."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.quantization is not None and self.lora is None:
            yield "quantization needs lora: quantized weights cannot be trained"

    @property
    def updates(self) -> Updates:
        return "weights" if self.lora is None else "adapter"

    @property
    def merges(self) -> bool:
        return self.lora is not None and self.lora.merge


def resolve_overflow(overflow: str, limit: int | None) -> str:
    """Return `overflow` with `auto` resolved: `truncate` if a limit in tokens is set, else `error`."""
    if overflow != "auto":
        return overflow
    return "error" if limit is None else "truncate"
