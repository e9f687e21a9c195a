"""What holds for all tests."""

from __future__ import annotations

import os

import pytest

LONG = "FINETUNE_LONG_TESTS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `long` take many minutes each on two cores: they run where the environment asks for them."""
    if os.environ.get(LONG):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(f"takes many minutes: set {LONG}=1"))
