"""The stages of a job: each is a member field of `Stage`, and exactly one is set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.data import DataSpec
from finetune_api.training import STREAMING_RULE, Lora, PositiveInt, Quantization, TrainingSpec

STAGE_KINDS = ("tokenizer", "pretrain", "sft", "dpo")

SpecialToken = Annotated[str, Field(min_length=1, max_length=64)]
LossWeight = Annotated[float, Field(ge=0, le=1000)]
Overflow = Literal["auto", "error", "truncate", "drop", "split"]
StageName = Annotated[
    str,
    Field(
        max_length=40,
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        json_schema_extra=expects("up to 40 lower-case letters, digits and inner dashes"),
    ),
]

_QUANTIZED_LORA = cel(
    "!has(self.quantization) || has(self.lora)", "quantization needs lora: quantized weights don't train"
)
_PACKING = cel("!self.packing || has(self.maxLength)", "packing needs maxLength, the length of a packed row")


class TokenizerSpec(ApiModel):
    """A byte-level BPE tokenizer trained from a corpus, with a chat template that marks assistant tokens."""

    data: DataSpec
    """Corpus. A share of it (`validationSplit`, 0.05 where that is 0) measures bytes per token."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 32000
    """Tokens in the vocabulary, special tokens included."""
    min_frequency: PositiveInt = 2
    """How often a pair must occur to be merged."""
    special_tokens: Annotated[list[SpecialToken], Field(max_length=256)] = Field(default=[])
    """Special tokens beside the built-in ones (end of text, start and end of a turn, mask, padding)."""
    model_max_length: PositiveInt | None = None
    """Longest input in tokens, saved with the tokenizer. Default: the model's context."""


class PretrainSpec(TrainingSpec):
    """Language modelling on plain text, from scratch or continued."""

    objective: Literal["causal", "masked"] = "causal"
    """`causal`: predict the next token, in packed blocks. `masked`: predict hidden tokens (BERT), of which 80% are
    replaced by the mask token, 10% by a random one and 10% kept."""
    block_size: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Tokens per training row; documents are joined and cut into rows of this length."""
    mlm_probability: Annotated[float, Field(ge=0.01, le=0.9)] = 0.15
    """Share of the tokens hidden by `objective: masked`."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay; norms and biases have none."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay rate of the second moment."""


class SftSpec(TrainingSpec):
    """Supervised fine-tuning: the loss is on the assistant's tokens of every turn."""

    model_config = rules(STREAMING_RULE, _QUANTIZED_LORA, _PACKING)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest example in tokens. Default: the model's context."""
    overflow: Overflow = "auto"
    """What happens to a longer example: `error` refuses the job, `truncate` cuts its end, `drop` leaves it out,
    `split` goes on in a further row. `auto`: `truncate` where `maxLength` is set, else `error`."""
    packing: bool = False
    """Fill rows of `maxLength` with several examples, kept exactly apart by the attention mask."""
    lora: Lora | None = None
    """Train adapters. Default: train every weight."""
    quantization: Quantization | None = None
    """Quantize the base model under the adapters. Default: not quantized."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _quantization_faults(self)
        if self.packing and self.max_length is None:
            yield "packing needs maxLength, the length of a packed row"


class DpoSpec(TrainingSpec):
    """Direct preference optimisation on pairs of a chosen and a rejected answer."""

    model_config = rules(
        STREAMING_RULE,
        _QUANTIZED_LORA,
        cel(
            "self.reference != 'adapterDisabled' || has(self.lora)",
            "reference adapterDisabled needs lora: without adapters there is none to disable",
        ),
        cel(
            "self.reference != 'precomputed' || !self.data.streaming",
            "reference precomputed needs data that is not streaming",
        ),
        cel(
            "!('exo_pair' in self.lossType) || self.labelSmoothing > 0.0",
            "lossType exo_pair needs labelSmoothing > 0",
        ),
        cel(
            "!has(self.lossWeights) || self.lossWeights.size() == self.lossType.size()",
            "lossWeights needs one value for each loss type",
        ),
    )

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest prompt with answer, in tokens. Default: the model's context."""
    overflow: Literal["auto", "error", "truncate", "drop"] = "auto"
    """What happens to a longer pair: `error` refuses the job, `truncate` cuts its end, `drop` leaves it out.
    `auto`: `truncate` where `maxLength` is set, else `error`."""
    beta: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Strength of the pull towards the reference model."""
    loss_type: Annotated[
        list[
            Literal[
                "sigmoid",
                "hinge",
                "ipo",
                "exo_pair",
                "nca_pair",
                "robust",
                "bco_pair",
                "sppo_hard",
                "aot",
                "aot_unpaired",
                "apo_zero",
                "apo_down",
                "discopop",
                "sft",
                "sigmoid_norm",
            ]
        ],
        Field(min_length=1, max_length=8),
    ] = Field(default=["sigmoid"])
    """TRL's loss types; several are added up by `lossWeights`."""
    loss_weights: Annotated[list[LossWeight], Field(min_length=1, max_length=8)] | None = None
    """Weight of each loss type. Default: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round."""
    reference: Literal["auto", "adapterDisabled", "model", "precomputed"] = "auto"
    """Where the reference's log-probabilities come from: the same model without its adapter, a second model, or one
    pass before training. `auto`: `adapterDisabled` with `lora`, else `model`."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Peak learning rate of AdamW."""
    lora: Lora | None = None
    """Train adapters. Default: train every weight."""
    quantization: Quantization | None = None
    """Quantize the base model under the adapters. Default: not quantized."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _quantization_faults(self)
        if self.reference == "adapterDisabled" and self.lora is None:
            yield "reference adapterDisabled needs lora: without adapters there is none to disable"
        if self.reference == "precomputed" and self.data.streaming:
            yield "reference precomputed needs data that is not streaming"
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            yield "lossType exo_pair needs labelSmoothing > 0"
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield f"lossWeights has {len(self.loss_weights)} values for {len(self.loss_type)} loss types"


AdapterSpec = SftSpec | DpoSpec
TrainedSpec = PretrainSpec | SftSpec | DpoSpec
StageSpec = TokenizerSpec | TrainedSpec


class Stage(ApiModel):
    """One step of the pipeline: exactly one member field says which."""

    model_config = rules(exactly_one(*STAGE_KINDS))

    name: StageName | None = None
    """Name of the stage in status, logs and paths. Default: the member field's name."""
    tokenizer: TokenizerSpec | None = None
    """Train a tokenizer; the first stage."""
    pretrain: PretrainSpec | None = None
    """Train on plain text."""
    sft: SftSpec | None = None
    """Supervised fine-tuning."""
    dpo: DpoSpec | None = None
    """Preference tuning."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *STAGE_KINDS)

    @property
    def kind(self) -> str:
        """The member field that is set."""
        return next(kind for kind in STAGE_KINDS if getattr(self, kind) is not None)

    @property
    def spec(self) -> StageSpec:
        """The member field's value."""
        spec: StageSpec = getattr(self, self.kind)
        return spec

    @property
    def title(self) -> str:
        """The stage's name, or its kind where it has none."""
        return self.name or self.kind


def _quantization_faults(spec: AdapterSpec) -> Iterator[str]:
    if spec.quantization is not None and spec.lora is None:
        yield "quantization needs lora: quantized weights don't train"
