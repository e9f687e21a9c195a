"""Stages that train a model on completions that it generates itself: `rlhf` and `online`."""

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

PROMPTS_STREAM = "prompts cannot be streamed: set data.streaming: false"
PROMPTS_RULE: Json = cel("!self.data.streaming", PROMPTS_STREAM)
MAX_KL_FAULT = "maxKl needs beta > 0: with beta 0 there is no reference model to measure the KL divergence from"
REWARDS = ("stage", "model", "function", "exactMatch", "regex")


class Sampling(ApiModel):
    """Sampling of completions, with the names of transformers' `GenerationConfig`."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Maximum number of tokens of a completion."""
    temperature: Annotated[float, Field(gt=0, le=100, json_schema_extra={"minimum": 0})] = 1.0
    """Sampling temperature: the logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Sample only from the most likely tokens whose probabilities add up to this value. Default: all tokens."""
    top_k: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Sample only from this many of the most likely tokens. Default: all tokens."""


class Reward(ApiModel):
    """One reward of a completion. Set exactly one of `stage`, `model`, `function`, `exactMatch` and `regex`."""

    model_config = rules(exactly_one(*REWARDS))

    stage: StageName | None = None
    """Name of an earlier `reward` stage."""
    model: Path | None = None
    """A reward model: a directory, a storage URI or a Hub id."""
    function: FunctionPath | None = None
    """A Python function with the signature of TRL's reward functions: `package.module:name`. On a cluster its module
    must be in the image."""
    exact_match: Column | None = None
    """Column with the expected completion. The reward is 1 if the completion equals it, ignoring leading and trailing
    whitespace, else 0."""
    regex: Pattern | None = None
    """Python regular expression. The reward is 1 if the completion contains a match, else 0."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Weight of this reward in the sum of all rewards."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *REWARDS)


class PromptSpec(AdapterSpec):
    """Training on completions that the model generates. A row is a prompt."""

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE)

    max_prompt_length: PositiveInt | None = None
    """Maximum length of a prompt in tokens. Default: the context length of the model minus
    `generation.maxNewTokens`."""
    overflow: Literal["auto", "error", "drop"] = "auto"
    """What to do with a longer prompt. `error`: refuse the job. `drop`: remove it. `auto`: `drop` if `maxPromptLength`
    is set, else `error`."""
    generation: Sampling = Sampling()
    """Sampling of completions."""
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
        """Yield the field path and the name of each earlier `reward` stage that this stage uses.

        Paths are relative to the spec.
        """
        for path, scorer in self.scorers.items():
            if scorer.stage is not None:
                yield f"{path}.stage", scorer.stage


class RlhfSpec(PromptSpec):
    """Reinforcement learning from rewards with RLOO or GRPO."""

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE, cel("!has(self.maxKl) || self.beta > 0.0", MAX_KL_FAULT))

    algorithm: Literal["rloo", "grpo"] = "rloo"
    """`rloo` (arXiv 2402.14740): the KL divergence from the reference model is subtracted from the reward, as in
    InstructGPT; the baseline is the mean reward of the other completions of the prompt. `grpo` (arXiv 2402.03300):
    rewards are divided by their standard deviation per prompt; the KL divergence is a term of the loss."""
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=16)]
    """Rewards of a completion. The total reward is their weighted sum."""
    beta: Annotated[float, Field(ge=0, le=100)] = 0.05
    """Coefficient of the KL divergence from the reference model, which is the model that the stage starts from. 0: no
    reference model is loaded."""
    max_kl: Annotated[float, Field(gt=0, le=1e6, json_schema_extra={"minimum": 0})] | None = None
    """Upper bound of the KL divergence from the reference model, in nats per completion. If a step exceeds it, the
    stage ends with the last model within the bound. Default: no bound."""
    num_generations: Annotated[int, Field(ge=2, le=1024)] = 4
    """Completions per prompt."""
    num_iterations: Annotated[int, Field(ge=1, le=64)] = 1
    """Optimizer steps per batch of generated completions."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Clipping range of the probability ratio between the current policy and the one that generated the completion."""
    vllm: Literal["auto", "off"] = "auto"
    """Library that generates the completions. `auto`: vLLM on GPUs, if it is installed and supports the model that is
    trained; `finetune plan` shows the choice and the reason. An unsupported version of vLLM is refused. `off`:
    transformers."""

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


CRITERIA_FAULT = "criteria needs endpoint"
JUDGES = ("stage", "model", "function", "endpoint")


class Judge(ApiModel):
    """Judge that scores completions. Set exactly one of `stage`, `model`, `function` and `endpoint`."""

    model_config = rules(exactly_one(*JUDGES), cel("has(self.endpoint) || !has(self.criteria)", CRITERIA_FAULT))

    stage: StageName | None = None
    """Name of an earlier `reward` stage."""
    model: Path | None = None
    """A reward model: a directory, a storage URI or a Hub id."""
    function: FunctionPath | None = None
    """A Python function with the signature of TRL's reward functions: `package.module:name`. On a cluster its module
    must be in the image."""
    endpoint: Endpoint | None = None
    """A chat model that rates all completions of a prompt in one request."""
    criteria: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """Criteria of a good completion, passed to the model of the endpoint. Default: correct, relevant, clear,
    harmless."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *JUDGES)
        if self.criteria is not None and self.endpoint is None:
            yield CRITERIA_FAULT


class OnlineSpec(PromptSpec, PreferenceLoss):
    """Rounds of DPO on completions that the model generates (iterative DPO, arXiv 2312.16682).

    Each round samples completions for each prompt, lets a judge score them, and trains on the best against the worst.
    The next round starts from the new model.
    """

    model_config = rules(PROMPTS_RULE, QUANTIZED_LORA_RULE, *LOSS_RULES)

    judge: Judge
    """Judge that scores the completions of a prompt. Prompts whose completions all have the same score are skipped in
    that round."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of rounds. `numTrainEpochs` applies to the pairs of each round, `maxSteps` to all rounds together."""
    prompts_per_round: PositiveInt | None = None
    """Prompts per round. The next round continues after them. Default: all."""
    num_generations: Annotated[int, Field(ge=2, le=1024)] = 4
    """Completions per prompt and round."""
    reference: Literal["start", "previous"] = "start"
    """Reference model of the loss. `start`: the model that the stage starts from. `previous`: the model that the round
    starts from."""

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
