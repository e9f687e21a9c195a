"""Which experts are selected, and which configurations and score files are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune_cli.main import app
from finetune_trainer.errors import UserError
from finetune_trainer.esft.selection import ExpertConfig, config_problems, read_config, read_scores, select


@pytest.mark.parametrize(
    ("scores", "threshold", "chosen"),
    [
        ([0.1, 0.4, 0.2, 0.3], 0.2, (1,)),
        ([0.1, 0.4, 0.2, 0.3], 0.4, (1,)),  # reaches the threshold exactly
        ([0.1, 0.4, 0.2, 0.3], 0.41, (1, 3)),  # the expert that crosses the threshold is selected
        ([0.25, 0.25, 0.25, 0.25], 0.5, (0, 1)),  # ties go to the lower id
        ([0.1, 0.3, 0.3, 0.3], 0.61, (1, 2, 3)),
        ([0.5, 0.5], 1.0, (0, 1)),
        ([0.2, 0.3], 0.9, (1, 0)),  # never reaches it: all experts
        ([0.10004, 0.10003, 0.4], 0.45, (2, 0)),
        ([0.10001, 0.10004, 0.4], 0.45, (2, 0)),  # equal once rounded to 4 decimals: the lower id, not the higher score
        ([0.12344, 0.12346, 0.4], 0.45, (2, 1)),  # 0.1234 and 0.1235
    ],
)
def test_rules(scores: list[float], threshold: float, chosen: tuple[int, ...]) -> None:
    assert select(scores, threshold) == chosen


def _reference(scores: dict[str, float], top_p: float) -> list[int]:
    """Select experts as the paper describes: walk down the sorted scores while their sum is below p."""
    walked, total = [], 0.0
    for expert, score in sorted(((int(name), value) for name, value in scores.items()), key=lambda one: -one[1]):
        if total >= top_p:
            break
        walked.append(expert)
        total += score
    return walked


def test_a_summary_of_the_reference_code(tmp_path: Path) -> None:
    """Read 26 layers of 64 experts in the published format, with many ties, through the command line."""
    table = {
        str(layer): {str(expert): round(((layer * 37 + expert * 101) % 97) / 3100, 4) for expert in range(64)}
        for layer in (1, 10, 2, *range(3, 10), *range(11, 27))
    }
    scores, out = tmp_path / "summary.json", tmp_path / "expert_config.json"
    scores.write_text(json.dumps({"token_scores": table, "gate_scores": table}))
    result = CliRunner().invoke(app, ["select-experts", str(scores), "--out", str(out)])
    assert result.exit_code == 0, result.output
    config = read_config(out)
    assert {str(layer): list(ids) for layer, ids in config.experts.items()} == {
        layer: _reference(row, 0.2) for layer, row in table.items()
    }
    gate = CliRunner().invoke(app, ["select-experts", str(scores), "--score", "gate"])
    assert json.loads(gate.stdout)["experts"]["7"] == _reference(table["7"], 0.1)


ROW = [0.1, 0.4, 0.2, 0.3]
SHUFFLED = {"2": 0.2, "0": 0.1, "3": 0.3, "1": 0.4}


@pytest.mark.parametrize("row", [ROW, SHUFFLED, dict(enumerate(ROW))], ids=["list", "by name", "by number"])
@pytest.mark.parametrize("bare", [False, True], ids=["named", "bare"])
def test_forms_of_score_files(tmp_path: Path, row: Any, bare: bool) -> None:
    path = tmp_path / "scores.json"
    for layers in ({"10": row, "2": row}, {10: row, 2: row}):
        path.write_text(json.dumps(layers if bare else {"token_scores": layers}))
        assert read_scores(path, "token") == {10: ROW, 2: ROW}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{}", "token_scores"),
        ('{"token_scores": [[0.1, 0.9]]}', "by layer and expert"),  # the first layer's number is not known
        ("{", "not valid JSON"),
        ("[1]", "list"),
        ('{"gate_scores": {}}', "token_scores"),
        ('{"token_scores": {"1": 3}}', "by layer and expert"),
        ('{"token_scores": {"a": {"0": 0.1}}}', "by layer and expert"),
        ('{"token_scores": {"1": {"1": 0.1}}}', "by layer and expert"),
    ],
)
def test_score_files_that_are_none(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(UserError, match=part):
        read_scores(path, "token")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json"):
        read_config(tmp_path / "nothing.json")


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = ExpertConfig({3: (5, 1), 1: (0,)}, True, False, {"score": "token"})
    path = tmp_path / "expert_config.json"
    path.write_text(json.dumps(config.to_json()))
    again = read_config(path)
    assert (again.experts, again.shared_experts, again.non_expert_modules) == (config.experts, True, False)
    assert again.notes == {"score": "token"}


@pytest.mark.parametrize(
    ("experts", "part"),
    [
        ({0: (1,)}, "layer 0 has no routed experts; layers with experts: 1, 2"),
        ({1: (8, 2)}, "layer 1 has experts 0 to 7, not 8"),
        ({2: (2, 2)}, "layer 2 names an expert twice"),
        ({1: ()}, "nothing to train"),
    ],
)
def test_configurations_that_do_not_fit(experts: dict[int, Any], part: str) -> None:
    problems = config_problems(ExpertConfig(experts), {1: 8, 2: 8}, "stages[0].esft.expertConfig")
    assert any(part in problem.message for problem in problems)
    assert {problem.path for problem in problems} == {"stages[0].esft.expertConfig"}
