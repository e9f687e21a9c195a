"""Helpers for synthesis jobs: their inputs and output files, and the stage without Ray."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support.jobs.in_process import open_stage
from support.synthesis.faulty_teacher import FaultyTeacher

from finetune_trainer.errors import Interrupted
from finetune_trainer.stages import perform
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.stage_io import StageIO

Job = dict[str, Any]
SCRIPT = """
CREATE TABLE singer (name TEXT PRIMARY KEY, age INTEGER, country TEXT);
CREATE TABLE concert (title TEXT, singer TEXT, year INTEGER);
INSERT INTO singer VALUES ('Ada', 31, 'Malta'), ('Bo', 45, 'Peru'), ('Cy', 27, 'Peru');
INSERT INTO concert VALUES ('One', 'Ada', 2001), ('Two', 'Bo', 2003);
"""
GRAPH = """
CREATE NODE TABLE Movie(title STRING PRIMARY KEY, released INT64);
CREATE NODE TABLE Person(name STRING PRIMARY KEY);
CREATE REL TABLE ACTED_IN(FROM Person TO Movie, role STRING);
CREATE (:Movie {title: 'A', released: 1999}), (:Movie {title: 'B', released: 2001}), (:Person {name: 'X'});
MATCH (p:Person), (m:Movie) CREATE (p)-[:ACTED_IN {role: 'hero'}]->(m);
"""
WORDS = ("reefs", "rivers", "forests", "deserts", "islands", "glaciers", "meadows", "caves")
DOCUMENTS = [
    f"Land {number} counts {number * 7 + at} {word} that are older than its towns. "
    f"In land {number} the {word} lose about a tenth of their size in each decade. "
    f"People of land {number} name {word} after birds and after old kings."
    for number in range(4)
    for at, word in enumerate(WORDS)
]


def brain() -> Callable[[Job], str]:
    """Return the example server's rules, which occasionally give an unparseable answer."""
    namespace: dict[str, Any] = {"__name__": "rules"}
    exec((Path(__file__).parents[3] / "examples" / "teacher_server.py").read_text(), namespace)

    def answer(body: Job) -> str:
        text = str(namespace["answer"](body["messages"]))
        unreadable = (
            len(body["messages"]) == 1 and sum(map(ord, text)) % 9 == 0 and "Task:" in body["messages"][0]["content"]
        )
        return "I would rather talk about something else." if unreadable else text

    return answer


def stage(server: FaultyTeacher, method: Job, **endpoint: Any) -> Job:
    """Return the stage; its timeout suits a busy machine, because the server counts each answer that it sends."""
    at = {"baseUrl": server.url, "model": "teacher", "promptPrice": 1.0, "completionPrice": 2.0, "timeoutSeconds": 15}
    return {"synthesize": {**method, "teacher": {"endpoint": {**at, **endpoint}}}}


def files(job: Job) -> Path:
    return Path(job["spec"]["storage"]["path"], job["metadata"]["name"], "stages", "00-synthesize")


def rows(job: Job) -> list[Job]:
    return [json.loads(line) for line in (files(job) / "rows.jsonl").read_text().splitlines()]


def account(job: Job) -> Job:
    return dict(json.loads((files(job) / "synthesis.json").read_text()))


def journaled(job: Job) -> int:
    return sum(part.read_bytes().count(b"\n") for part in (files(job) / "journal").glob("*.jsonl"))


def end_whole_tree(process: Any) -> None:
    """Kill the driver and all its descendants at once, as a power failure does, and wait until they are gone."""
    below = psutil.Process(process.pid).children(recursive=True)
    for one in [psutil.Process(process.pid), *below]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate(timeout=60)
    assert not psutil.wait_procs(below, timeout=60)[1]


class _End:
    """A worker's channel without a driver: events are dropped, and a `threading.Event` requests a stop."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def send(self, event: object) -> None:
        """Drop the event."""

    def stop_requested(self) -> bool:
        return self._stop.is_set()


def perform_stage(job: Job, directory: Path, stop: threading.Event | None = None) -> dict[str, float] | None:
    """Run the job's first stage in this process; return None if it was stopped. Relative paths start in `directory`."""
    context = open_stage(job, directory)
    end: Any = _End(stop or threading.Event())
    tools = StageIO(context, Storage(context.run.root), Collectives(), end, directory / "scratch")
    try:
        return perform(context, tools)
    except Interrupted:
        return None


if __name__ == "__main__":
    perform_stage(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
