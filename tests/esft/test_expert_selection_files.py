"""`expertConfig` with a configuration file, a score file or expert ids, and which of them are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.stages import EsftSpec
from finetune_trainer.errors import UserError
from finetune_trainer.esft.selection import ExpertConfig, select
from finetune_trainer.model.expert_selection import load_expert_config

SIZES = {1: 4, 2: 4, 10: 4}
ROWS = {"1": [0.1, 0.4, 0.2, 0.3], "10": [0.25, 0.25, 0.25, 0.25], "2": [0.7, 0.1, 0.1, 0.1]}
SUMMARY = {"token_scores": {layer: {str(at): value for at, value in enumerate(row)} for layer, row in ROWS.items()}}


def given(directory: Path, choice: dict[str, Any], **fields: Any) -> ExpertConfig:
    """Return the expert configuration of a stage with that `expertConfig`."""
    (directory / "summary.json").write_text(json.dumps(SUMMARY | {"gate_scores": SUMMARY["token_scores"]}))
    (directory / "experts.json").write_text(json.dumps({"experts": {"2": [3, 0]}, "shared_experts": True}))
    data = {"sources": [{"inline": [{"messages": []}]}]}
    spec = EsftSpec.model_validate({"data": data, "expertConfig": choice} | fields)
    return load_expert_config(spec, "stages[0].esft", str(directory), SIZES)


def test_a_score_file_is_selected_from_by_the_stages_rule(tmp_path: Path) -> None:
    config = given(tmp_path, {"scores": "summary.json"}, threshold=0.6)
    assert config.experts == {1: (1, 3), 10: (0, 1, 2), 2: (0,)}
    assert list(config.experts) == [1, 10, 2]  # in the order of the file
    assert config.notes == {"given": True, "score": "token", "threshold": 0.6}
    gate = given(tmp_path, {"scores": "summary.json"}, score="gate")
    assert gate.experts == {int(layer): select(row, 0.1) for layer, row in ROWS.items()}


def test_a_configuration_and_ids(tmp_path: Path) -> None:
    config = given(tmp_path, {"file": "experts.json"})
    assert config.experts == {2: (3, 0)} and config.shared_experts and not config.non_expert_modules
    config = given(tmp_path, {"experts": {"10": [2]}}, trainNonExperts=True)
    assert config.experts == {10: (2,)} and config.non_expert_modules and not config.shared_experts


@pytest.mark.parametrize(
    ("choice", "place", "parts"),
    [
        ({"file": "missing.json"}, "file", ("missing.json",)),
        ({"scores": "missing.json"}, "scores", ("missing.json",)),
        ({"file": "summary.json"}, "file", ("score file", "expertConfig.scores")),
        ({"scores": "experts.json"}, "scores", ("token_scores",)),
        ({"experts": {"3": [0]}}, "experts", ("layer 3 has no routed experts", "1, 2, 10")),
        ({"experts": {"2": [4, 9]}}, "experts", ("layer 2 has experts 0 to 3, not 4, 9",)),
        ({"experts": {"1": [2, 2]}}, "experts", ("layer 1 names an expert twice",)),
        ({"experts": {"first": [0]}}, "experts", ("expert ids by layer",)),
        ({"experts": {"7": [0], "1": [5, 5]}}, "experts", ("layer 7", "not 5", "twice")),  # reports all errors at once
    ],
)
def test_faults_name_their_place(tmp_path: Path, choice: dict[str, Any], place: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        given(tmp_path, choice)
    assert {problem.path for problem in caught.value.problems} == {f"stages[0].esft.expertConfig.{place}"}
    said = "\n".join(problem.message for problem in caught.value.problems)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("row", "part"),
    [([0.5, 0.5], "layer 1 has scores of 2 experts, but the model has 4"), ([1, "NaN", 0, 0], "by layer and expert")],
)
def test_scores_of_another_model(tmp_path: Path, row: list[Any], part: str) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"token_scores": {"1": row}}))
    with pytest.raises(UserError, match=part):
        given(tmp_path, {"scores": "other.json"})
