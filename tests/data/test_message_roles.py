"""Roles in conversations: a misspelled standard role is reported; roles that only the template knows are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.data import DataSpec
from finetune_trainer.data.row_formats import FormError, normalise

SPEC = DataSpec.model_validate({"sources": [{"inline": [{"text": "x"}]}]})


def conversation(role: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("usr", "user"),
        ("User", "user"),
        ("human", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("asistant", "assistant"),
    ],
)
def test_slips_are_told(role: str, meant: str) -> None:
    with pytest.raises(FormError, match=f"did you mean `{meant}`"):
        normalise(conversation(role), SPEC, "sft")


@pytest.mark.parametrize("role", ["tool", "developer", "function", "observation", "ipython", "critic"])
def test_roles_of_templates_pass(role: str) -> None:
    assert normalise(conversation(role), SPEC, "sft") == conversation(role)
