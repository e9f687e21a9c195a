"""Read a run's files from storage into plain values; an unreadable file becomes a note, not an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from finetune_api.base import Json
from finetune_api.runconfig import RunConfig
from finetune_trainer.layout import RUN_CONFIG, StageLayout
from finetune_trainer.progress.metrics_log import read_metrics
from finetune_trainer.storage.filesystem import Storage

Points = list[tuple[int, float]]

_USER_INFO = re.compile(r"(://)[^/@\s]+@")


@dataclass(frozen=True)
class StageRecord:
    """The files of one stage in storage. A value is empty if its file is missing."""

    layout: StageLayout
    kind: str
    rows: list[Json] = field(default_factory=list)
    """Rows of the metrics log in step order, with the nested `metrics` of each row merged into it."""
    data: Json = field(default_factory=dict)
    samples: Json = field(default_factory=dict)
    experts: Json = field(default_factory=dict)
    """Scores of the experts, the selected experts and their load balance (`esft`)."""
    expert_load: bytes = b""
    """Plot of the expert load, a PNG."""
    synthesis: Json = field(default_factory=dict)
    """Statistics and samples of the generated rows (`synthesize`)."""
    evaluation: Json = field(default_factory=dict)
    """Metrics and sample answers by model (`evaluate`)."""
    rounds: Json = field(default_factory=dict)
    """Generated pairs and metrics of each round (`online`)."""
    done: Json = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """One note for each file that can't be read."""

    @property
    def state(self) -> str:
        """`done`, `unfinished` or `not run yet`."""
        if self.done:
            return "done"
        return "unfinished" if self.rows or self.data or self.synthesis else "not run yet"

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics of a finished stage, else the last logged value of each evaluation metric."""
        given = self.done.get("metrics")
        if isinstance(given, dict):
            return {str(name): value for name, value in given.items() if is_number(value)}
        names = {name: None for row in self.rows for name in row if name.startswith("eval_")}
        return {name: self.points(name)[-1][1] for name in names if self.points(name)}

    @property
    def seconds(self) -> float | None:
        return _first_number(self.done.get("seconds"), *self._column("seconds")[-1:])

    @property
    def steps(self) -> int | None:
        known = _first_number(self.done.get("steps"), *[row["step"] for row in self.rows[-1:]])
        return None if known is None else int(known)

    @property
    def tokens(self) -> float | None:
        """Number of tokens trained on."""
        return _first_number(*self._column("tokens")[-1:])

    def points(self, name: str) -> Points:
        """Return the finite values of one metric with their steps."""
        return [(row["step"], row[name]) for row in self.rows if is_number(row.get(name)) and math.isfinite(row[name])]

    def _column(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]


@dataclass(frozen=True)
class RunRecord:
    """A run: its resolved configuration and its stages in order."""

    name: str
    config: Json
    stages: list[StageRecord]
    notes: list[str]


def collect(storage: Storage, stages: Sequence[StageLayout], run: RunConfig) -> RunRecord:
    """Read a run's files.

    Raises:
        OSError: storage can't be reached.
    """
    notes: list[str] = []
    config = _read_object(storage, RUN_CONFIG, notes) or run.to_json()
    kinds = [stage.kind for stage in run.job.spec.stages]
    records = [
        _stage(storage, layout, kinds[layout.index] if layout.index < len(kinds) else layout.title) for layout in stages
    ]
    return RunRecord(run.job.metadata.name, without_user_info(config), records, notes)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an int or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_user_info(value: Any) -> Any:
    """Return the JSON value with `user:password@` removed from every URI."""
    if isinstance(value, dict):
        return {name: without_user_info(member) for name, member in value.items()}
    if isinstance(value, list):
        return [without_user_info(member) for member in value]
    return _USER_INFO.sub(r"\1…@", value) if isinstance(value, str) else value


def _stage(storage: Storage, layout: StageLayout, kind: str) -> StageRecord:
    notes: list[str] = []
    return StageRecord(
        layout=layout,
        kind=kind,
        rows=[_flat(row) for row in read_metrics(_read(storage, layout.metrics, notes) or "")],
        data=_read_object(storage, layout.data_report, notes),
        samples=_read_object(storage, layout.samples, notes),
        experts=_read_object(storage, layout.expert_scores, notes),
        synthesis=_read_object(storage, layout.synthesis, notes),
        evaluation=_read_object(storage, layout.evaluation, notes),
        rounds=_read_object(storage, layout.rounds, notes),
        expert_load=_read_bytes(storage, layout.expert_load),
        done=_read_object(storage, layout.done, notes),
        notes=notes,
    )


def _read(storage: Storage, path: str, notes: list[str]) -> str | None:
    try:
        return storage.read_text(path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        notes.append(f"{path} is left out: it is not UTF-8 text.")
        return None


def _read_bytes(storage: Storage, path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return b""


def _read_object(storage: Storage, path: str, notes: list[str]) -> Json:
    text = _read(storage, path, notes)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        notes.append(f"{path} is left out: it is not valid JSON.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path} is left out: it is a {type(value).__name__}, expected an object.")
        return {}
    return value


def _flat(row: Json) -> Json:
    return {**row.get("metrics", {}), **{name: value for name, value in row.items() if name != "metrics"}}


def _first_number(*values: Any) -> float | None:
    return next((value for value in values if is_number(value)), None)
