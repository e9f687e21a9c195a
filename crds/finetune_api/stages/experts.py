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
    """Return the default threshold of cumulative scores that selects experts (arXiv 2407.01906)."""
    return 0.2 if score == "token" else 0.1


class GivenExperts(ApiModel):
    """Explicit selection of the experts to train. Set exactly one of `file`, `scores` and `experts`."""

    model_config = rules(exactly_one("file", "scores", "experts"))

    file: Path | None = None
    """An `expert_config.json` in the format of a `scoreOnly` stage or of the ESFT reference code."""
    scores: Path | None = None
    """A score file: `expert_scores.json` of a stage, or `summary.json` of the ESFT reference code. `score` and
    `threshold` of the stage select experts from it."""
    experts: dict[str, Annotated[list[ExpertId], Field(min_length=1, max_length=4096)]] | None = None
    """Expert ids by layer index, such as `"1": [8, 26]`. Layers that are not listed stay frozen."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "file", "scores", "experts")


class EsftSpec(SupervisedSpec):
    """Expert-specialized fine-tuning (ESFT, arXiv 2407.01906).

    It fine-tunes those experts of each layer to which the training data is routed.
    """

    model_config = rules(
        STREAMING_RULE,
        PACKING_RULE,
        cel(
            "!self.scoreOnly || !has(self.expertConfig)",
            "scoreOnly excludes expertConfig: scores are measured to select experts, and expertConfig selects them",
        ),
    )

    score: Literal["token", "gate"] = "token"
    """Score that measures the affinity of an expert to the data. `token`: its fraction of the routed tokens. `gate`:
    its mean routing weight before any renormalization. Only `token` is comparable across model families."""
    threshold: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] | None = None
    """Experts are selected in descending order of their scores until the sum of the scores reaches this value. Default:
    0.2 for `token`, 0.1 for `gate`."""
    sample_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 131_072
    """Number of tokens of the training data, including prompts, on which the scores are measured."""
    expert_config: GivenExperts | None = None
    """Explicit selection of the experts. Default: the experts that the scores on the training data select."""
    score_only: bool = False
    """Measure the scores and write `expert_config.json` and a chart without training. The next stage starts from the
    same model."""
    train_shared_experts: bool = False
    """Train the shared experts too."""
    train_non_experts: bool = False
    """Train all other weights too: attention, norms, embeddings, dense layers and routers."""
    merge: bool = True
    """true: write a complete model at the end of the stage. false: write only the trained experts, as an adapter of the
    model that the stage started from."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-5
    """Peak learning rate of AdamW."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.score_only and self.expert_config is not None:
            yield (
                "scoreOnly excludes expertConfig: scores are measured to select experts, and expertConfig selects them"
            )

    @property
    def top_p(self) -> float:
        """The threshold, or the default for the score."""
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
