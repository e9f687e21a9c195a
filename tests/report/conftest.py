from __future__ import annotations

from types import ModuleType

import pytest
from support.report import synthetic as made_up_run


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """Return the module that writes a synthetic run."""
    return made_up_run
