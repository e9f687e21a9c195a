"""Short constructors of a job, its runs and its pods, for the operator's pure functions."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.report import AttemptReport
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, PodView, RunState, RunView
from finetune_operator.engines import ENGINES
from finetune_operator.engines.registry import facts

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
UID = "0123abcd-0000-0000-0000-000000000000"


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def body(status: Json | None = None, **spec: Any) -> Json:
    """Return a FineTuneJob as the API server stores it."""
    data = {"sources": [{"inline": [{"text": "a b c"}]}]}
    fields: Json = {
        "model": {"config": {"model_type": "llama"}},
        "stages": [{"tokenizer": {"data": data}}, {"pretrain": {"data": data, "maxSteps": 10}}],
        "storage": {"uri": "s3://bucket/runs"},
        "kubernetes": {"preflight": False},
    }
    metadata = {
        "name": "tiny",
        "namespace": "team",
        "uid": UID,
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": ago(3600),
    }
    return {"metadata": metadata, "spec": fields | spec, "status": status or {}}


def run(number: int = 1, state: RunState = RunState.RUNNING, **fields: Any) -> RunView:
    created = NOW - timedelta(seconds=fields.pop("age", 60))
    fields = {"engine": "job"} | fields
    return RunView(f"tiny-{number}", "tiny", fields.pop("owner", UID), number, state, created, **fields)


def pod(number: int = 1, index: int = 0, **fields: Any) -> PodView:
    if "grace_over" in fields:
        fields["grace_over"] = NOW - timedelta(seconds=fields["grace_over"])
    fields = {"phase": "Running", "node": "node-a"} | fields
    return PodView(fields.pop("name", f"tiny-{number}-{index}-x"), "tiny", number, index, **fields)


def said(code: int | None = None, message: str | None = None, **fields: Any) -> str:
    """Return a termination message."""
    report = {"exitCode": code, "message": message, **fields}
    return json.dumps({name: value for name, value in report.items() if value is not None})


def seen(status: Json | None = None, *things: RunView | PodView, report: Json | None = None, **spec: Any) -> Observed:
    """Return the observed state of a job with that status."""
    runs = tuple(thing for thing in things if isinstance(thing, RunView))
    pods = tuple(thing for thing in things if isinstance(thing, PodView))
    job = body(status, **spec)
    engines = facts(job["spec"], Settings(), ENGINES)
    return Observed(job, runs, pods, AttemptReport.model_validate(report) if report else None, engines)


def attempt(number: int, reason: str = "", ended: float | None = None, **fields: Any) -> Json:
    """Return the record of an attempt that ended `ended` seconds ago, or that is running."""
    record: Json = {"number": number, "startTime": ago(600)}
    if ended is not None:
        retryable = reason not in ("UserError", "OOMKilled", "CUDAOutOfMemory")
        record |= {"endTime": ago(ended), "reason": reason, "message": f"because {reason}", "retryable": retryable}
        record |= {"counts": reason not in ("Evicted", "Interrupted", "Suspended"), "checkpoint": None}
    return record | fields


def conditions(**kinds: str) -> list[Json]:
    """Return conditions from `Validated="True/Valid"` and the like."""
    found = []
    for kind, text in kinds.items():
        status, _, reason = text.partition("/")
        found.append({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": ago(500)})
    return found


VALID = conditions(Validated="True/Valid", Planned="True/PreflightSkipped")
