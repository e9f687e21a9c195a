"""Format log lines on the operations that the operator applies and on the attempts of a job. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_operator.core.conditions import Reason
from finetune_operator.decide import attempts
from finetune_operator.plan import Annotate, Create, Delete, Operation, SetFinalizers

Json = dict[str, Any]
_STATUS_FIELDS = ("phase", "attempt", "stage", "step")


def operation_line(operation: Operation) -> str:
    """Return one line that names the operation and its object."""
    if isinstance(operation, Create):
        metadata = operation.body["metadata"]
        reason = f" ({operation.body['reason']})" if operation.body["kind"] == "Event" else ""
        return f"create {operation.body['kind']} {metadata['namespace']}/{metadata['name']}{reason}"
    name = _object_name(operation.path)
    if isinstance(operation, Delete):
        return f"delete {name}"
    if isinstance(operation, SetFinalizers):
        return f"set finalizers of {name}: {', '.join(operation.finalizers) or 'none'}"
    if isinstance(operation, Annotate):
        return f"annotate {name}: {', '.join(f'{key}={value}' for key, value in operation.annotations.items())}"
    fields = (f"{field} {operation.status[field]}" for field in _STATUS_FIELDS if operation.status.get(field))
    return f"patch status of {name}: {', '.join(fields) or ', '.join(operation.status)}"


def attempt_lines(before: Json, after: Json) -> Iterator[str]:
    """Yield a line for each attempt that has started or ended between two states of a job's status."""
    for record in attempts.records(after):
        number = record["number"]
        old = attempts.record_of(before, number)
        if old is None:
            yield f"attempt {number} started"
        if "endTime" in record and "endTime" not in (old or {}):
            yield f"attempt {number} {_end(record)}"


def _end(record: Json) -> str:
    """Return how an attempt ended; it `failed` if it counts towards `runPolicy.backoffLimit`, else it `ended`."""
    if record["reason"] == Reason.COMPLETED.value:
        return f"ended: {record['reason']}"
    code = f" (exit code {record['exitCode']})" if record.get("exitCode") is not None else ""
    message = " ".join(record["message"].split())
    verb = "failed" if record["counts"] else "ended"
    return f"{verb}: {record['reason']}{code}" + (f": {message}" if message else "")


def _object_name(path: str) -> str:
    """Return `plural namespace/name` of an object's path."""
    _, namespace, plural, name, *_ = path.partition("/namespaces")[2].split("/")
    return f"{plural} {namespace}/{name}"
