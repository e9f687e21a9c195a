"""What holds for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONG = "FINETUNE_LONG_TESTS"
ONE_AFTER_ANOTHER = ("cluster", "e2e")
"""Folders whose tests share control planes and wait more than they compute: one process of `pytest -n` has them all."""


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `long` take many minutes each on two cores: they run where the environment asks for them."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("cluster" if folder in ONE_AFTER_ANOTHER else str(item.path)))
    if os.environ.get(LONG):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(f"takes many minutes: set {LONG}=1"))
