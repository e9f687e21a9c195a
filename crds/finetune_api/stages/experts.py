"""Expert-specialized fine-tuning of mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, not_exactly_one, rules
from finetune_api.declaration import Produces, Updates
from finetune_api.model import Path
from finetune_api.stages.supervised import PACKING_RULE, SupervisedSpec
from finetune_api.training import STREAMING_RULE

ExpertId = Annotated[int, Field(ge=0, le=65535)]


def default_threshold(score: Literal["token", "gate"]) -> float:
    """The sum of scores that selects experts where none is given (arXiv 2407.01906)."""
    return 0.2 if score == "token" else 0.1


class GivenExperts(ApiModel):
    """The experts to train, or the scores that select them, given by hand."""

    model_config = rules(exactly_one("file", "scores", "experts"))

    file: Path | None = None
    """An `expert_config.json`, as a `scoreOnly` stage or the ESFT reference code writes it."""
    scores: Path | None = None
    """A score file: a stage's `expert_scores.json`, or a `summary.json` of the ESFT reference code. The stage's `score`
    and `threshold` select from it."""
    experts: dict[str, Annotated[list[ExpertId], Field(min_length=1, max_length=4096)]] | None = None
    """Expert ids by the layer's number in the model, such as `"1": [8, 26]`; layers left out stay frozen."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "file", "scores", "experts")


class EsftSpec(SupervisedSpec):
    """Expert-specialized fine-tuning of a mixture-of-experts model (arXiv 2407.01906): of each layer only the experts
    that the task's data is routed to are trained, by supervised fine-tuning."""

    model_config = rules(
        STREAMING_RULE,
        PACKING_RULE,
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
    expert_config: GivenExperts | None = None
    """The experts to train. Default: those that the scores of the training data select."""
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

    @property
    def trains(self) -> bool:
        return not self.score_only

    @property
    def produces(self) -> Produces:
        return "nothing" if self.score_only else "model"

    @property
    def updates(self) -> Updates:
        return "experts"

    @property
    def merges(self) -> bool:
        return self.merge
