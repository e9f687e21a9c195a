"""Stages that train a model on its own answers to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.data import Column, StageName
from finetune_api.declaration import PaddingSide, RowKind
from finetune_api.endpoint import Endpoint
from finetune_api.model import Path
from finetune_api.stages.preference import LOSS_RULES, PreferenceLoss
from finetune_api.training import (
    QUANTIZED_LORA_RULE,
    AdapterSpec,
    PositiveInt,
)

FunctionPath = Annotated[
    str,
    Field(
        max_length=512,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        json_schema_extra=expects("an import path such as `package.module:name`"),
    ),
]
Pattern = Annotated[str, Field(min_length=1, max_length=4096)]

PROMPTS_STREAM = "prompts are not streamed: leave data.streaming false"
PROMPTS_RULE: Json = cel("!self.data.streaming", PROMPTS_STREAM)
MAX_KL_FAULT = "maxKl needs beta > 0: without it there is no reference to measure from"
REWARDS = ("stage", "model", "function", "exactMatch", "regex")


class Sampling(ApiModel):
    """How answers are drawn, under the names of transformers' `GenerationConfig`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Most tokens of one answer."""
    temperature: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] = 1.0
    """Divides the logits."""
    top_p: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Draw among the likeliest tokens that together have this probability. Default: all."""
    top_k: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Draw among so many of the likeliest tokens. Default: all."""


class Reward(ApiModel):
    """What an answer is worth: exactly one of `stage`, `model`, `function`, `exactMatch` and `regex`."""

    model_config = rules(exactly_one(*REWARDS))

    stage: StageName | None = None
    """Name of an earlier `reward` stage."""
    model: Path | None = None
    """A reward model: a directory, a storage URI or a hub id."""
    function: FunctionPath | None = None
    """A Python function with the signature of TRL's reward functions, `package.module:name`. On a cluster its module is
    in the image."""
    exact_match: Column | None = None
    """Column with the right answer: 1 where the answer is the same, white space around both left out, else 0."""
    regex: Pattern | None = None
    """Python regular expression: 1 where it is found in the answer, else 0."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Factor in the sum of all rewards."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *REWARDS)


class PromptSpec(AdapterSpec):
    """Training on a model's own answers to prompts; a row is a prompt."""

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE)

    max_prompt_length: PositiveInt | None = None
    """Longest prompt in tokens. Default: what the model's context leaves beside an answer."""
    overflow: Literal["auto", "error", "drop"] = "auto"
    """What happens to a longer prompt: `error` refuses the job, `drop` leaves it out. `auto`: `drop` where
    `maxPromptLength` is set, else `error`."""
    generation: Sampling = Sampling()
    """How answers are drawn."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.data.streaming:
            yield PROMPTS_STREAM

    @property
    def row_kind(self) -> RowKind:
        return "prompt"

    @property
    def row_limit(self) -> int | None:
        return self.max_prompt_length

    @property
    def row_overflow(self) -> str:
        if self.overflow != "auto":
            return self.overflow
        return "error" if self.max_prompt_length is None else "drop"

    @property
    def answer_length(self) -> int:
        return self.generation.max_new_tokens

    @property
    def generates(self) -> bool:
        return True

    @property
    def token_loss(self) -> bool:
        return False

    @property
    @abstractmethod
    def answers_per_prompt(self) -> int:
        """Answers drawn to each prompt."""

    @property
    @abstractmethod
    def scorers(self) -> Mapping[str, Reward | Judge]:
        """What scores the answers, by its place below the spec."""

    def reward_stages(self) -> Iterator[tuple[str, str]]:
        """Each earlier stage whose reward model scores answers: its place below the spec, and its name."""
        for place, scorer in self.scorers.items():
            if scorer.stage is not None:
                yield f"{place}.stage", scorer.stage


class RlhfSpec(PromptSpec):
    """Reinforcement learning: answers that earn more than others to the same prompt become likelier."""

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE, cel("!has(self.maxKl) || self.beta > 0.0", MAX_KL_FAULT))

    algorithm: Literal["rloo", "grpo"] = "rloo"
    """`rloo` (arXiv 2402.14740): the KL to the reference is taken off the reward, as in InstructGPT, and the baseline
    is the mean of the prompt's other answers. `grpo` (arXiv 2402.03300): rewards are scaled by their spread per
    prompt, and the KL is part of the loss."""
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=16)]
    """What an answer is worth: the weighted sum."""
    beta: Annotated[float, Field(ge=0, le=100)] = 0.05
    """Weight of the KL to the reference, the model that the stage starts from; 0 does without a reference."""
    max_kl: Annotated[float, Field(gt=0, le=1e6, json_schema_extra={"minimum": 0})] | None = None
    """Most KL to the reference, in nats per answer: the stage ends early with the last model within it. Default: no
    bound."""
    num_generations: Annotated[int, Field(ge=2, le=1024)] = 4
    """Answers to each prompt of a step."""
    num_iterations: Annotated[int, Field(ge=1, le=64)] = 1
    """Optimizer steps on the answers to one batch of prompts."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.2
    """How far the likelihood of an answer may move from where it was drawn before its gradient is clipped."""
    vllm: Literal["auto", "off"] = "auto"
    """What generates the answers. `auto`: vLLM on GPUs, where it is installed and can take the model in training; the
    plan says which and why, and another version of vLLM than the supported one is refused. `off`: transformers."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.max_kl is not None and self.beta == 0:
            yield MAX_KL_FAULT

    @property
    def sequences_per_row(self) -> int:
        return self.num_generations

    @property
    def answers_per_prompt(self) -> int:
        return self.num_generations

    @property
    def scorers(self) -> Mapping[str, Reward | Judge]:
        return {f"rewards[{index}]": reward for index, reward in enumerate(self.rewards)}

    @property
    def holds_reference(self) -> bool:
        return self.beta > 0 and self.lora is None

    @property
    def extra_forwards(self) -> int:
        return 1 if self.beta > 0 else 0

    @property
    def padding_side(self) -> PaddingSide:
        """TRL's policy trainers pad prompts on the left."""
        return "left"


CRITERIA_FAULT = "criteria goes with endpoint"
JUDGES = ("stage", "model", "function", "endpoint")


class Judge(ApiModel):
    """What says which answers are better: exactly one of `stage`, `model`, `function` and `endpoint`."""

    model_config = rules(exactly_one(*JUDGES), cel("has(self.endpoint) || !has(self.criteria)", CRITERIA_FAULT))

    stage: StageName | None = None
    """Name of an earlier `reward` stage."""
    model: Path | None = None
    """A reward model: a directory, a storage URI or a hub id."""
    function: FunctionPath | None = None
    """A Python function with the signature of TRL's reward functions, `package.module:name`. On a cluster its module is
    in the image."""
    endpoint: Endpoint | None = None
    """A chat model that rates all answers to a prompt in one request."""
    criteria: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """What makes an answer good, in words to the endpoint's model. Default: right, to the point, clear, harmless."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *JUDGES)
        if self.criteria is not None and self.endpoint is None:
            yield CRITERIA_FAULT


class OnlineSpec(PromptSpec, PreferenceLoss):
    """Rounds of preference tuning on the model's own answers: draw some to each prompt, let a judge rank them, train on
    the best against the worst, begin again from the new model (arXiv 2312.16682)."""

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE, *LOSS_RULES)

    judge: Judge
    """What ranks the answers to a prompt. Prompts whose answers it ranks alike are left out of the round."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Rounds; `numTrainEpochs` is of each round's pairs, `maxSteps` of all rounds together."""
    prompts_per_round: PositiveInt | None = None
    """Prompts of a round; the next one goes on behind them. Default: all."""
    num_generations: Annotated[int, Field(ge=2, le=1024)] = 4
    """Answers to each prompt of a round."""
    reference: Literal["start", "previous"] = "start"
    """What `beta` pulls towards: the model that the stage starts from, or the one that the round starts from."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.loss_faults()

    @property
    def sequences_per_row(self) -> int:
        """The best and the worst answer."""
        return 2

    @property
    def answers_per_prompt(self) -> int:
        return self.num_generations

    @property
    def scorers(self) -> Mapping[str, Reward | Judge]:
        return {"judge": self.judge}

    @property
    def holds_reference(self) -> bool:
        return self.reference == "start" and self.lora is None

    @property
    def extra_forwards(self) -> int:
        """None while training: the reference's log-probabilities are part of each round's pairs."""
        return 0
