"""Each stage's spec declares the properties of its stage, and a spec without them is rejected."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.stages import STAGE_KINDS, Stage
from finetune_api.training import TrainingSpec

DATA = {"sources": [{"file": "rows.jsonl"}]}
NEEDED: dict[str, dict[str, Any]] = {
    "rlhf": {"rewards": [{"regex": "a"}]},
    "online": {"judge": {"stage": "reward"}},
    "evaluate": {"metrics": ["perplexity"]},
    "synthesize": {"evolve": {}, "teacher": {"model": {}}},
}


class Undeclared(TrainingSpec):
    """A spec of a stage without declarations of its own."""


def spec_of(kind: str, **fields: Any) -> Any:
    return Stage.model_validate({kind: {"data": DATA, **NEEDED.get(kind, {}), **fields}}).spec


def test_a_spec_that_leaves_a_declaration_out_cannot_be_created() -> None:
    with pytest.raises(TypeError, match=r"abstract.*extra_forwards.*holds_reference.*row_kind"):
        Undeclared.model_validate({"data": DATA})


def test_every_kind_of_stage_is_a_member() -> None:
    assert set(STAGE_KINDS) == set(Stage.model_fields) - {"name"}


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_every_stage_declares_rows_and_products(kind: str) -> None:
    spec = spec_of(kind)
    assert spec.row_kind and spec.produces and spec.updates and isinstance(spec.trains, bool)


@pytest.mark.parametrize(
    ("kind", "fields", "holds", "forwards"),
    [
        ("sft", {}, False, 0),
        ("reward", {}, False, 0),
        ("dpo", {}, True, 1),
        ("dpo", {"lora": {}}, False, 1),
        ("dpo", {"lora": {}, "reference": "model"}, True, 1),
        ("dpo", {"reference": "precomputed"}, False, 0),
        ("rlhf", {}, True, 1),
        ("rlhf", {"lora": {}}, False, 1),
        ("rlhf", {"beta": 0.0}, False, 0),
        ("online", {}, True, 0),
        ("online", {"reference": "previous"}, False, 0),
    ],
)
def test_the_reference_of_each_stage(kind: str, fields: dict[str, Any], holds: bool, forwards: int) -> None:
    """The memory plan and the FLOPs of a step depend on the reference model."""
    spec = spec_of(kind, **fields)
    assert (spec.holds_reference, spec.extra_forwards) == (holds, forwards)


@pytest.mark.parametrize(
    ("kind", "fields", "produces", "starts_next"),
    [
        ("tokenizer", {}, "tokenizer", True),
        ("pretrain", {}, "model", True),
        ("esft", {}, "model", True),
        ("esft", {"scoreOnly": True}, "nothing", False),
        ("reward", {}, "rewardModel", False),
        ("synthesize", {}, "data", False),
        ("evaluate", {}, "nothing", False),
    ],
)
def test_what_a_stage_leaves_to_the_next(kind: str, fields: dict[str, Any], produces: str, starts_next: bool) -> None:
    spec = spec_of(kind, **fields)
    assert (spec.produces, spec.produces_model) == (produces, starts_next)
