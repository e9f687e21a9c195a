"""The columns of `kubectl get ftj`, derived from the conditions and the progress (pure)."""

from __future__ import annotations

from typing import Any

from finetune_operator.core.conditions import Reason, Type

Json = dict[str, Any]
_END_PHASES = {Type.SUCCEEDED.value: "Succeeded", Type.FAILED.value: "Failed", Type.SUSPENDED.value: "Suspended"}
MAX_SECONDS = 999 * 86400
_WAIT_PHASES = {
    Reason.STOPPING.value: "Stopping",
    Reason.BACK_OFF.value: "Retrying",
    Reason.QUEUED.value: "Queued",
    Reason.FORBIDDEN.value: "Pending",
}


def columns(status: Json, spec: Json, stopping: bool = False) -> Json:
    """Return phase, stage, step, loss and ETA; unknown values have no entry."""
    stages, progress = status.get("stages") or [], status.get("progress") or {}
    found: Json = {"phase": phase(status, stopping), "stage": _stage(stages, spec)}
    running = found["phase"] in ("Running", "Stopping")
    if progress:
        found["step"] = f"{progress['step']}/{progress['total']}"
        if progress.get("loss") is not None:
            found["loss"] = f"{progress['loss']:.4g}"
        found["eta"] = duration(progress["etaSeconds"]) if running and "etaSeconds" in progress else ""
    return found


def phase(status: Json, stopping: bool = False) -> str:
    """Return the phase of a job, derived from its conditions."""
    conditions = {item["type"]: item for item in status.get("conditions", [])}
    for kind, name in _END_PHASES.items():
        if conditions.get(kind, {}).get("status") == "True":
            return name
    running = conditions.get(Type.RUNNING.value, {})
    if stopping or running.get("reason") in _WAIT_PHASES:
        return _WAIT_PHASES.get(running.get("reason", ""), "Stopping")
    if running.get("status") == "True":
        return "Running"
    if conditions.get(Type.PLANNED.value, {}).get("status") == "Unknown":
        return "Preflight"
    return "Pending"


def _stage(stages: list[Json], spec: Json) -> str:
    total = len(spec.get("stages", []))
    if not stages:
        return f"0/{total}"
    running = next((i for i, stage in enumerate(stages) if stage["state"] == "Running"), None)
    done = sum(stage["state"] == "Succeeded" for stage in stages)
    index = running if running is not None else max(done - 1, 0)
    return f"{index + 1 if done or running is not None else 0}/{total} {stages[index]['name']}"


def duration(seconds: float) -> str:
    """Return a duration as `45s`, `12m`, `3h20m` or `2d4h`."""
    seconds = min(max(seconds, 0), MAX_SECONDS)
    minutes = int(seconds) // 60
    if seconds < 60:
        return f"{int(seconds)}s"
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60}m"
    return f"{minutes // 1440}d{minutes % 1440 // 60}h"


def plan_summary(plan: Json | None) -> str:
    """Return preflight's plan in one line; empty without a plan."""
    if not plan:
        return ""
    parts = [f"{plan['parameters']:,} parameters"]
    if plan.get("steps"):
        parts.append(f"{plan['steps']} steps")
    if plan.get("memoryBytes"):
        parts.append(f"{plan['memoryBytes'] / 2**30:.1f} GiB per worker")
    if plan.get("zero") is not None:
        parts.append(f"ZeRO-{plan['zero']}")
    if plan.get("checkpointBytes"):
        seconds = duration(plan["saveSeconds"]) if plan.get("saveSeconds") is not None else "?"
        parts.append(f"{plan['checkpointBytes'] / 2**30:.1f} GiB per checkpoint, {seconds} to save")
    warnings = "".join(f". Warning: {warning}" for warning in plan.get("warnings") or [])
    return ", ".join(parts) + warnings
