"""Reads and writes `metrics.jsonl`, the metrics of a stage as JSON lines, which stays readable after a crash."""

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
    """Appends one line per logged step. Each line is flushed to the operating system before `append` returns.

    A resumed run appends its steps again; `read_metrics` then uses the later line. An incomplete line of an earlier
    attempt is ended first, so that it does not corrupt the next one.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        incomplete = _ends_incomplete(self.path)
        self._file = open(self.path, "a", encoding="ascii")  # noqa: SIM115 (closed by `close`)
        if incomplete:
            self._file.write("\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row with the key `step`, such as `Progress.to_json()`.

        Numbers that are not finite are written as strings (`"NaN"`, `"Infinity"`), because JSON has no such numbers.
        """
        self._file.write(json.dumps(_encodable(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_metrics(text: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics log in order of their steps, one row per step.

    Fields of a later line replace those of an earlier line with the same step: a resumed run repeats steps, and the
    evaluation after a step may be a separate line. Incomplete lines and lines without a step are ignored.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        row = _parse(line)
        if row is not None:
            known = rows.setdefault(row["step"], {})
            metrics = {**known.get("metrics", {}), **row.get("metrics", {})}
            known.update(row, **({"metrics": metrics} if metrics else {}))
    return [rows[step] for step in sorted(rows)]


def _ends_incomplete(path: Path) -> bool:
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
