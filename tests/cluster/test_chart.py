"""The chart on a real API server: what its rules allow is what the operator needs, and no more."""

from __future__ import annotations

import pytest
from access import Access


@pytest.mark.parametrize("verb", ["update", "patch", "create"])
def test_the_operator_may_not_write_specs(operator_access: Access, namespace: str, verb: str) -> None:
    asked = ["auth", "can-i", verb, "finetunejobs.finetune.dev", f"--namespace={namespace}"]
    assert operator_access.kubectl(*asked, check=False).stdout == "no\n"
