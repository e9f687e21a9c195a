"""The Lua health check for Argo CD maps each phase of a job to a health status of Argo CD."""

from __future__ import annotations

from typing import Any

import pytest
from lupa.lua51 import LuaRuntime  # the Lua version of gopher-lua, which Argo CD uses
from support.cluster.helm_chart import CHART

Json = dict[str, Any]
SCRIPT = (CHART / "argocd" / "health.lua").read_text()


def health(job: Json) -> tuple[str, str]:
    lua = LuaRuntime()
    lua.globals().obj = lua.table_from(job, recursive=True)
    said = lua.execute(SCRIPT)
    return said["status"], said["message"]


def job(phase: str, generation: int = 2, **status: Any) -> Json:
    return {"metadata": {"generation": generation}, "status": {"phase": phase, "observedGeneration": 2, **status}}


def condition(kind: str, reason: str, message: str, status: str = "True") -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("Pending", "Progressing"),
        ("Preflight", "Progressing"),
        ("Running", "Progressing"),
        ("Stopping", "Progressing"),
        ("Retrying", "Progressing"),
        ("Queued", "Progressing"),
        ("Suspended", "Suspended"),
        ("Succeeded", "Healthy"),
        ("Failed", "Degraded"),
    ],
)
def test_each_phase(phase: str, expected: str) -> None:
    assert health(job(phase))[0] == expected


def test_what_the_operator_has_not_seen_is_not_over() -> None:
    assert health({"metadata": {"generation": 1}}) == ("Progressing", "waits for the operator")
    assert health(job("Succeeded", generation=3)) == ("Progressing", "waits for the operator")


def test_messages_tell_why_and_how_far() -> None:
    conditions = [
        condition("Running", "Training", "", status="False"),
        condition("Failed", "UserError", "stages[0].sft.data: no such file"),
    ]
    failed = health(job("Failed", conditions=conditions, stage="1/2 sft", step="3/10"))
    assert failed == ("Degraded", "UserError: stages[0].sft.data: no such file")
    assert health(job("Running", stage="2/4 sft", step="3/10")) == ("Progressing", "Running, stage 2/4 sft, step 3/10")
    assert health(job("Pending", step="")) == ("Progressing", "Pending")
