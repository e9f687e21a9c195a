"""A valid job of every kind of stage, for the tests to break."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.api.sample_job import JOB


@pytest.fixture
def job() -> dict[str, Any]:
    """A fresh copy of a valid job with one stage of each kind."""
    return copy.deepcopy(JOB)
