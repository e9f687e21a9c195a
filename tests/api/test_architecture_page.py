"""The files and folders that docs/architecture.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md", "README.md")


@pytest.mark.parametrize("page", PAGES)
def test_paths_on_the_page_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:crds|operator|trainer|cli|charts|tests|examples|benchmarks|docs)/[\w./-]*)`", text)
    assert named, "the page names no path"
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_layers_are_those_of_import_linter() -> None:
    import tomllib

    page = (ROOT / "docs" / "architecture.md").read_text()
    written = page.split("## The trainer's layers, from the top\n\n")[1].split(". A folder")[0]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == ["finetune_trainer"])
    checked = [name for layer in layers for name in layer.split(" | ")]
    listed = [name for layer in written.split(">") for name in re.findall(r"`(\w+)`", layer)]
    assert [name for name in checked if name in listed] == listed
