"""A fixture with a valid job that has one stage of each kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.api.sample_job import JOB


@pytest.fixture
def job() -> dict[str, Any]:
    """Return a fresh copy of the valid job, which a test may change."""
    return copy.deepcopy(JOB)
