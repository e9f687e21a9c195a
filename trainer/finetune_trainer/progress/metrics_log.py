"""`metrics.jsonl`: a stage's curve as JSON lines, which a kill at any moment leaves readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends one line per logged step; each line is on its way to the disk when `append` returns.

    A resumed run appends its steps again: `read_metrics` lets the later line win. A line that an earlier attempt left
    half-written is closed off first, so that it can't swallow the next one.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_torn(self.path)
        self._file = open(self.path, "a", encoding="ascii")  # noqa: SIM115 (closed by `close`)
        if torn:
            self._file.write("\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, such as `Progress.to_json()`; it has a `step`. What is not finite is written as a string,
        `"NaN"` or `"Infinity"`, because JSON has no such numbers."""
        self._file.write(json.dumps(_encodable(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more rows follow; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_metrics(text: str) -> list[dict[str, Any]]:
    """The rows of a metrics log by rising step, each step once.

    A field of a later line replaces that of an earlier line with the same step: a resumed run repeats steps, and the
    evaluation after a step may be a line of its own. Torn lines and lines without a step are left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        row = _parse(line)
        if row is not None:
            known = rows.setdefault(row["step"], {})
            metrics = {**known.get("metrics", {}), **row.get("metrics", {})}
            known.update(row, **({"metrics": metrics} if metrics else {}))
    return [rows[step] for step in sorted(rows)]


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("metrics", {}), dict):
        return None
    decoded: dict[str, Any] = _decoded(row)
    return decoded


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _encodable(member) for name, member in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decoded(member) for name, member in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
