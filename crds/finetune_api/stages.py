"""The stages of a job: each is a member field of `Stage`, and exactly one is set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.data import DataSpec
from finetune_api.model import Path
from finetune_api.training import STREAMING_RULE, Lora, PositiveInt, Quantization, TrainingSpec

STAGE_KINDS = ("tokenizer", "pretrain", "sft", "esft", "dpo")

SpecialToken = Annotated[str, Field(min_length=1, max_length=64)]
ExpertId = Annotated[int, Field(ge=0, le=65535)]
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


class SupervisedSpec(TrainingSpec):
    """Training on dialogues: the loss is on the assistant's tokens of every turn."""

    model_config = rules(STREAMING_RULE, _PACKING)

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest example in tokens. Default: the model's context."""
    overflow: Overflow = "auto"
    """What happens to a longer example: `error` refuses the job, `truncate` cuts its end, `drop` leaves it out,
    `split` goes on in a further row. `auto`: `truncate` where `maxLength` is set, else `error`."""
    packing: bool = False
    """Fill rows of `maxLength` with several examples, kept exactly apart by the attention mask."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.packing and self.max_length is None:
            yield "packing needs maxLength, the length of a packed row"


class SftSpec(SupervisedSpec):
    """Supervised fine-tuning: the loss is on the assistant's tokens of every turn."""

    model_config = rules(STREAMING_RULE, _QUANTIZED_LORA, _PACKING)

    lora: Lora | None = None
    """Train adapters. Default: train every weight."""
    quantization: Quantization | None = None
    """Quantize the base model under the adapters. Default: not quantized."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _quantization_faults(self)


def default_threshold(score: Literal["token", "gate"]) -> float:
    """The sum of scores that selects experts where none is given (arXiv 2407.01906)."""
    return 0.2 if score == "token" else 0.1


class ExpertChoice(ApiModel):
    """The experts to train, given by hand."""

    model_config = rules(exactly_one("file", "experts"))

    file: Path | None = None
    """An `expert_config.json`, as a `scoreOnly` stage or the ESFT reference code writes it."""
    experts: dict[str, Annotated[list[ExpertId], Field(min_length=1, max_length=4096)]] | None = None
    """Expert ids by the layer's number in the model, such as `"1": [8, 26]`; layers left out stay frozen."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "file", "experts")


class EsftSpec(SupervisedSpec):
    """Expert-specialized fine-tuning of a mixture-of-experts model (arXiv 2407.01906): of each layer only the experts
    that the task's data is routed to are trained, by supervised fine-tuning."""

    model_config = rules(
        STREAMING_RULE,
        _PACKING,
        cel(
            "!self.scoreOnly || !has(self.expertConfig)",
            "scoreOnly measures which experts to train, expertConfig says it: set one of them",
        ),
    )

    score: Literal["token", "gate"] = "token"
    """How an expert's affinity to the data is measured: `token`, its share of the routed tokens, or `gate`, its mean
    routing weight before any renormalisation. Only `token` compares between model families."""
    threshold: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Experts are chosen by falling score until their scores reach this sum. Default: 0.2 for `token`, 0.1 for
    `gate`."""
    sample_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 131_072
    """Tokens of the training data, prompts included, that the scores are measured on."""
    expert_config: ExpertChoice | None = None
    """The experts to train. Default: those that the scores select."""
    score_only: bool = False
    """Measure the scores and write `expert_config.json` and a picture, but train nothing; the next stage starts from
    the same model."""
    train_shared_experts: bool = False
    """Train the shared experts too."""
    train_non_experts: bool = False
    """Train everything that is no expert too: attention, norms, embeddings, dense layers and routers."""
    merge: bool = True
    """At the stage's end write a whole model (true), or the trained experts alone as an adapter of the model that the
    stage started from (false)."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-5
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.score_only and self.expert_config is not None:
            yield "scoreOnly measures which experts to train, expertConfig says it: set one of them"

    @property
    def top_p(self) -> float:
        """The threshold, or its default for the kind of score."""
        return self.threshold if self.threshold is not None else default_threshold(self.score)


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
TrainedSpec = PretrainSpec | SftSpec | EsftSpec | DpoSpec
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
    esft: EsftSpec | None = None
    """Fine-tuning of the experts that the data uses."""
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
