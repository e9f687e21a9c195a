"""The process that queries run in: it reads a JSON value a line, and answers each with one.

It knows neither the job nor its secrets, has a bound on its memory, and can write no file. Its parent kills it where a
query does not come to an end.
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
    """`child.py make ENGINE PATH`, statements on stdin; or `child.py run ENGINE PATH BYTES`, queries on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mode, engine, path = sys.argv[1:4]
    if mode == "make":
        _answer(_made(engine, path, sys.stdin.read()))
        return
    _serve(engine, path, int(sys.argv[4]))


def _made(engine: Any, path: str, statements: str) -> dict[str, Any]:
    try:
        make_database(engine, path, statements)
        open_database(engine, path).schema(0)
    except Exception as error:  # each engine has errors of its own; the parent tells them
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
        asked = json.loads(line)
        if "schema" in asked:
            _answer({"schema": database.schema(asked["schema"])})
        else:
            _answer(_ran(database, asked))


def _ran(database: Any, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        result = database.run(asked["query"], asked["seconds"], asked["most"])
    except QueryFailed as error:
        return {"kind": error.kind, "error": str(error)}
    except MemoryError:
        return {"kind": "memory", "error": "takes too much memory"}
    return {"columns": result.columns, "rows": result.rows, "more": result.more}


def _confine(memory: int) -> None:
    """No more address space than so many bytes beyond what is mapped by now, and no file grows."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _answer(value: dict[str, Any]) -> None:
    text = json.dumps(value, default=_plain)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """A decimal is a number, and all else that JSON has no form for is its text."""
    return float(value) if isinstance(value, Decimal) else str(value)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
