"""The process in which queries run: it reads one JSON value per line and answers each with one.

It has no access to the job or its secrets, a memory limit, and can't write files. Its parent kills it if a query does
not end.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from decimal import Decimal
from typing import Any

from finetune_trainer.queries.engines import make_database, open_database
from finetune_trainer.queries.result import QueryFailed


def main() -> None:
    """Run `child.py make ENGINE PATH` (statements on stdin) or `child.py run ENGINE PATH BYTES` (queries on stdin)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mode, engine, path = sys.argv[1:4]
    if mode == "make":
        _answer(_make(engine, path, sys.stdin.read()))
        return
    _serve(engine, path, int(sys.argv[4]))


def _make(engine: Any, path: str, statements: str) -> dict[str, Any]:
    try:
        make_database(engine, path, statements)
        open_database(engine, path).schema(0)
    except Exception as error:  # engines raise errors of many types; the parent reports them
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def _serve(engine: Any, path: str, memory: int) -> None:
    try:
        database = open_database(engine, path)
    except Exception as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        return
    _confine(memory)
    _answer({})
    for line in sys.stdin:
        request = json.loads(line)
        if "schema" in request:
            _answer({"schema": database.schema(request["schema"])})
        else:
            _answer(_run(database, request))


def _run(database: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        result = database.run(request["query"], request["seconds"], request["most"])
    except QueryFailed as error:
        return {"kind": error.kind, "error": str(error)}
    except MemoryError:
        return {"kind": "memory", "error": "takes too much memory"}
    return {"columns": result.columns, "rows": result.rows, "more": result.more}


def _confine(memory: int) -> None:
    """Limit address space to `memory` bytes more than are mapped now, and the size of written files to 0."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _answer(value: dict[str, Any]) -> None:
    text = json.dumps(value, default=_json_default)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _json_default(value: Any) -> Any:
    """Return a decimal as a number and any other value without a JSON type as text."""
    return float(value) if isinstance(value, Decimal) else str(value)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
