"""The record of a job's attempts in its status, and what follows from it for the next one (pure)."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from finetune_api.exit_codes import ExitCode
from finetune_operator.core.conditions import Reason, moment
from finetune_operator.core.settings import Settings

Json = dict[str, Any]
KEPT = 20
_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
_OUTAGE = re.compile(
    r"^[\w.]*(Connection|Timeout|HTTPClient|ClientOS|Disconnected)\w*|^OSError|\[Errno|timed? ?out|"
    r"[Cc]onnection (closed|reset|refused|aborted)|[Bb]roken pipe"
)
"""In messages of attempts that a store or the network has ended."""
_CHANGING = re.compile(r"0x[0-9a-f]+|/tmp/\S+|\d+(\.\d+)?", re.IGNORECASE)
"""What differs between two messages of the same error: addresses, temporary files, numbers."""


def records(status: Json) -> list[Json]:
    """All attempts on record, oldest first. One without `endTime` is still on its way."""
    found: list[Json] = status.get("attempts") or []
    return found


def last(status: Json) -> Json | None:
    """The attempt that ended last."""
    return next((record for record in reversed(records(status)) if "endTime" in record), None)


def record_of(status: Json, number: int) -> Json | None:
    return next((record for record in records(status) if record["number"] == number), None)


def closed(status: Json, number: int) -> bool:
    """Whether an attempt is on record as ended."""
    return "endTime" in (record_of(status, number) or {})


def next_number(status: Json) -> int:
    return max((record["number"] for record in records(status)), default=0) + 1


def progressed(status: Json, number: int) -> bool:
    """Whether there is a newer checkpoint than when the attempt began."""
    earlier = [record for record in records(status) if record["number"] < number]
    before = earlier[-1].get("checkpoint") if earlier else None
    now = (status.get("lastCheckpoint") or {}).get("uri")
    return now is not None and bool(now != before)


def failures(status: Json) -> int:
    """Failed attempts since the last progress: a newer checkpoint sets the count back."""
    count, position = 0, None
    for record in records(status):
        if record.get("checkpoint") != position:
            count, position = 0, record.get("checkpoint")
        count += bool(record.get("counts"))
    return count


def repeated(status: Json) -> str:
    """The message of an error that has ended the last two attempts at the same step; empty where none has.

    Only the trainer's own errors count: an outage may last for two attempts and be over in the third.
    """
    ended = [record for record in records(status) if "endTime" in record][-2:]
    if len(ended) < 2 or not all(map(_own_error, ended)):
        return ""
    one, other = ({name: record.get(name) for name in ("stage", "step")} for record in ended)
    same = _CHANGING.sub("#", ended[0]["message"]) == _CHANGING.sub("#", ended[1]["message"])
    return ended[1]["message"] if same and one == other else ""


def _own_error(record: Json) -> bool:
    own = record["reason"] == Reason.UNKNOWN.value and record.get("exitCode") == ExitCode.FAILED
    return bool(own and _ERROR.match(record["message"]) and not _OUTAGE.search(record["message"]))


def next_start(status: Json, settings: Settings) -> datetime | None:
    """When the next attempt may start: at once after a suspension, else after a wait that doubles.

    None: there was none before.
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
    """Return the nodes that the next attempt must keep away from: a GPU there has broken an earlier one.

    Empty again after an attempt for which no other node was found in time: a node that may work is better than none.
    """
    nodes: dict[str, None] = {}
    for record in records(status):
        if record.get("reason") == Reason.UNSCHEDULABLE.value:
            nodes.clear()
        elif "faultyNode" in record:
            nodes[record["faultyNode"]] = None
    return tuple(nodes)


def trimmed(status: Json) -> None:
    """Keep the newest records: a job that is suspended often must not outgrow its object."""
    if len(records(status)) > KEPT:
        status["attempts"] = records(status)[-KEPT:]
