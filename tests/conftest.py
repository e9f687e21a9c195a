"""Hooks for all tests: Ctrl-C, test order, the `long` marker, and distribution over processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

LONG = "FINETUNE_LONG_TESTS"
WAITING = ("tests/cluster/", "tests/e2e/")
"""Tests that share control planes and mostly wait: one process of `pytest -n` runs all of them in turn."""
FIRST = (*WAITING, "tests/jobs/")
"""Tests that start first because they take longest."""


def pytest_configure() -> None:
    """Restore the SIGINT handler, because background processes of a shell inherit SIGINT as ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest tests first; skip those marked `long` (minutes on two cores) unless the environment sets it."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    if os.environ.get(LONG):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(f"takes many minutes: set {LONG}=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assign whole files to each process, because xdist's own groups have no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "waiting" if nodeid.startswith(WAITING) else nodeid.partition("::")[0]

    return ByFile(config, log)
