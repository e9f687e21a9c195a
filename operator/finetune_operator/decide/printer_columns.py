"""What `kubectl get ftj` shows, derived from the conditions and the progress (pure)."""

from __future__ import annotations

from typing import Any

from finetune_operator.core.conditions import Reason, Type

Json = dict[str, Any]
_ENDS = {Type.SUCCEEDED.value: "Succeeded", Type.FAILED.value: "Failed", Type.SUSPENDED.value: "Suspended"}
LONGEST_SECONDS = 999 * 86400
_WAITS = {
    Reason.STOPPING.value: "Stopping",
    Reason.BACK_OFF.value: "Retrying",
    Reason.QUEUED.value: "Queued",
    Reason.FORBIDDEN.value: "Pending",
}


def columns(status: Json, spec: Json, stopping: bool = False) -> Json:
    """Phase, stage, step, loss and ETA; what isn't known has no entry."""
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
    """One word for people."""
    conditions = {item["type"]: item for item in status.get("conditions", [])}
    for kind, word in _ENDS.items():
        if conditions.get(kind, {}).get("status") == "True":
            return word
    running = conditions.get(Type.RUNNING.value, {})
    if stopping or running.get("reason") in _WAITS:
        return _WAITS.get(running.get("reason", ""), "Stopping")
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
    """`45s`, `12m`, `3h20m`, `2d4h`."""
    seconds = min(max(seconds, 0), LONGEST_SECONDS)
    minutes = int(seconds) // 60
    if seconds < 60:
        return f"{int(seconds)}s"
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60}m"
    return f"{minutes // 1440}d{minutes % 1440 // 60}h"


def plan_words(plan: Json | None) -> str:
    """Preflight's plan in a line."""
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
