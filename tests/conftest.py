"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

LONG = "FINETUNE_LONG_TESTS"
WAITING = ("tests/cluster/", "tests/e2e/")
"""Tests that share control planes and wait more than they compute: one process of `pytest -n` has them all, one after
the other, while another one computes."""
FIRST = (*WAITING, "tests/jobs/")
"""What takes longest begins first."""


def pytest_configure() -> None:
    """Ctrl-C works in what tests start in a shell's background too, whose children ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; those marked `long` (many minutes each on two cores) where the environment asks for them."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    if os.environ.get(LONG):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(f"takes many minutes: set {LONG}=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to each process: xdist's own groups do nothing with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "waiting" if nodeid.startswith(WAITING) else nodeid.partition("::")[0]

    return ByFile(config, log)
