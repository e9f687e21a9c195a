"""The records of a job's attempts in its status, and what they imply for the next attempt (pure)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from finetune_api.exit_codes import ExitCode
from finetune_operator.core.conditions import Reason, moment
from finetune_operator.core.settings import Settings

Json = dict[str, Any]
MAX_RECORDS = 20
_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
_OUTAGE = re.compile(
    r"^[\w.]*(Connection|Timeout|HTTPClient|ClientOS|Disconnected)\w*|^OSError|\[Errno|timed? ?out|"
    r"[Cc]onnection (closed|reset|refused|aborted)|[Bb]roken pipe"
)
"""Matches messages of attempts that failed because of storage or the network."""
_VARIABLE_PARTS = re.compile(r"0x[0-9a-f]+|/tmp/\S+|\d+(\.\d+)?", re.IGNORECASE)
"""Matches what differs between two messages of the same error: addresses, temporary files, numbers."""


def records(status: Json) -> list[Json]:
    """Return the records of all attempts, oldest first. A record without `endTime` is of an active attempt."""
    found: list[Json] = status.get("attempts") or []
    return found


def last(status: Json) -> Json | None:
    """Return the record of the attempt that ended last."""
    return next((record for record in reversed(records(status)) if "endTime" in record), None)


def record_of(status: Json, number: int) -> Json | None:
    return next((record for record in records(status) if record["number"] == number), None)


def closed(status: Json, number: int) -> bool:
    """Whether an attempt's record has an end."""
    return "endTime" in (record_of(status, number) or {})


def next_number(status: Json) -> int:
    return max((record["number"] for record in records(status)), default=0) + 1


def progressed(status: Json, number: int) -> bool:
    """Whether there is a newer checkpoint than at the start of the attempt."""
    earlier = [record for record in records(status) if record["number"] < number]
    before = earlier[-1].get("checkpoint") if earlier else None
    now = (status.get("lastCheckpoint") or {}).get("uri")
    return now is not None and bool(now != before)


def failures(status: Json) -> int:
    """Return the number of failed attempts since the last progress: a newer checkpoint resets the count."""
    count, checkpoint = 0, None
    for record in records(status):
        if record.get("checkpoint") != checkpoint:
            count, checkpoint = 0, record.get("checkpoint")
        count += bool(record.get("counts"))
    return count


def repeated(status: Json) -> str:
    """Return the message of an error that ended the last two attempts at the same step; empty if there is none.

    Only errors of the trainer itself count: an outage may last for two attempts and be over in the third.
    """
    ended = [record for record in records(status) if "endTime" in record][-2:]
    if len(ended) < 2 or not all(map(_own_error, ended)):
        return ""
    one, other = ({name: record.get(name) for name in ("stage", "step")} for record in ended)
    same = _VARIABLE_PARTS.sub("#", ended[0]["message"]) == _VARIABLE_PARTS.sub("#", ended[1]["message"])
    return ended[1]["message"] if same and one == other else ""


def _own_error(record: Json) -> bool:
    own = record["reason"] == Reason.UNKNOWN.value and record.get("exitCode") == ExitCode.FAILED
    return bool(own and _ERROR.match(record["message"]) and not _OUTAGE.search(record["message"]))


def next_start(status: Json, settings: Settings) -> datetime | None:
    """Return when the next attempt may start: at once after a suspension, else after exponential backoff.

    None if no attempt has ended.
    """
    record = last(status)
    if record is None:
        return None
    ended = moment(record["endTime"])
    if record.get("requested"):
        return ended
    wait = settings.backoff_seconds * 2 ** min(max(failures(status), 1) - 1, 20)
    return ended + timedelta(seconds=min(wait, settings.backoff_cap_seconds))


def avoided(status: Json) -> tuple[str, ...]:
    """Return the nodes that the next attempt must not use: a GPU fault there ended an earlier attempt.

    The list is cleared after an attempt for which no other node was found in time: a node that may work is better than
    none.
    """
    nodes: dict[str, None] = {}
    for record in records(status):
        if record.get("reason") == Reason.UNSCHEDULABLE.value:
            nodes.clear()
        elif "faultyNode" in record:
            nodes[record["faultyNode"]] = None
    return tuple(nodes)


def trimmed(status: Json) -> None:
    """Keep the newest `MAX_RECORDS` records: etcd limits an object's size."""
    if len(records(status)) > MAX_RECORDS:
        status["attempts"] = records(status)[-MAX_RECORDS:]
