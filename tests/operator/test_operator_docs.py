"""The operator's documentation matches its code."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_operator.core.conditions import Reason, Type

TEXT = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
MODULES = Path(__file__).parents[2] / "operator" / "finetune_operator"


def first_cells(heading: str) -> set[str]:
    """Return the words in the first column of the table below a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]
    return {word.strip() for row in rows for word in row.split(",")}


def test_every_condition_reason_and_exit_code_is_documented() -> None:
    assert first_cells("Conditions") == {kind.value for kind in Type}
    assert first_cells("Reasons") == {reason.value for reason in Reason}
    assert first_cells("Exit codes of an attempt") == {str(code.value) for code in ExitCode}


def test_every_module_is_in_the_table() -> None:
    table = TEXT.split("what it does |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)/?`", table))
    present = {path.stem for path in MODULES.iterdir() if not path.name.startswith("__")}
    steps = {path.stem for path in (MODULES / "decide").glob("[a-z]*.py")}
    assert present | steps - {"actions"} <= named | {"metrics", "token_key"}
