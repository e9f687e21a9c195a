"""`--set stages[0].sft.learningRate=1e-4`: overrides of fields of a job file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from finetune_api.base import Json
from finetune_api.crd import structural_schema
from finetune_api.job import FineTuneJob
from finetune_api.messages import Loc, counted, field_path, object_path, shown
from finetune_api.problems import Problem, did_you_mean

_PART = re.compile(r"\.?([^.\[\]=\s]+)|\[([^\[\]]+)\]")


class OverrideError(ValueError):
    """Invalid assignments, one problem each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))

    def __reduce__(self) -> tuple[type[OverrideError], tuple[list[Problem]]]:
        """Keep the problems when pickled, as `UserError` does."""
        return type(self), (self.problems,)


class _Refused(Exception):
    """The reason why an assignment is invalid."""


def apply_overrides(data: Json, assignments: list[str], parse: Callable[[str], object]) -> Json:
    """Return a copy of the job `data` with the assignments `path=value` applied in order.

    The result is not validated: pass it to `check_job`. Missing parents of a known field are created.

    Args:
        assignments: the path is as in messages, with or without a leading `spec.`. Names with dots go into brackets:
            `labels[app.kubernetes.io/name]`.
        parse: parses a value (YAML).

    Raises:
        OverrideError: an assignment has no `=`, an invalid path, an index out of range or an unknown parent.
    """
    result = copy.deepcopy(data)
    problems = []
    for assignment in assignments:
        try:
            _assign(result, assignment, parse)
        except _Refused as refused:
            problems.append(Problem("", f"--set {assignment}: {refused}"))
    if problems:
        raise OverrideError(problems)
    return result


def assigned_fields(assignments: list[str]) -> list[str]:
    """Return the field paths of valid assignments, as in messages: `stages[0].sft.learningRate`."""
    return [field_path(_parsed_path(assignment.partition("=")[0].strip())) for assignment in assignments]


def _assign(data: Json, assignment: str, parse: Callable[[str], object]) -> None:
    path, equals, text = assignment.partition("=")
    if not equals:
        raise _Refused("expected path=value, such as stages[0].sft.learningRate=1e-4")
    loc = _parsed_path(path.strip())
    try:
        value = parse(text)
    except Exception as error:
        raise _Refused(f"the value is not valid YAML: {' '.join(str(error).split())}") from error
    schema = structural_schema(FineTuneJob)
    target: Any = data
    for depth in range(1, len(loc)):
        target, schema = _child(target, schema, loc[:depth], make=[] if isinstance(loc[depth], int) else {})
    _check_index(target, loc)
    target[loc[-1]] = value


def _parsed_path(path: str) -> Loc:
    """Return the location in the document of a path such as `stages[0].sft`."""
    loc: list[str | int] = []
    end = 0
    for match in _PART.finditer(path):
        if match.start() != end or (not loc and path[:1] in ".["):
            break
        end = match.end()
        name, index = match.groups()
        loc.append(name or (int(index) if re.fullmatch("[0-9]{1,9}", index) else index.strip("\"'")))
    if not loc or end != len(path):
        raise _Refused(f"{path!r} is not a path such as stages[0].sft.learningRate" if path else "the path is empty")
    top = structural_schema(FineTuneJob)["properties"]
    return tuple(loc) if loc[0] in top else ("spec", *loc)


def _child(target: Any, schema: Json, loc: Loc, make: Any) -> tuple[Any, Json]:
    """Return the child of `target` at the end of `loc`, and its schema. Create the child if it is missing and known."""
    _check_index(target, loc)
    name = loc[-1]
    known: Json = schema.get("properties", {})
    inner: Json = schema.get("items", {}) if isinstance(name, int) else known.get(name, {})
    if isinstance(target, dict) and target.get(name) is None:
        if known and name not in known:
            raise _Refused(f"unknown field `{name}` in {object_path(loc[:-1])}{did_you_mean(str(name), known)}")
        if isinstance(make, list):
            raise _Refused(f"{field_path(loc)}: the job has no {name}")
        target[name] = make
    elif isinstance(target, list) and target[int(name)] is None:
        target[int(name)] = make
    target[name] = copy.copy(target[name])  # YAML anchors share containers: change only this one
    return target[name], inner


def _check_index(target: Any, loc: Loc) -> None:
    """Refuse a name in a list, an index in a mapping or out of range, and any child of a scalar."""
    part, parent = loc[-1], object_path(loc[:-1])
    if isinstance(target, list):
        if not isinstance(part, int):
            raise _Refused(f"{parent} is a list: expected an index, such as {parent}[0]")
        if part >= len(target):
            owner, noun = ("the job", parent) if parent == "stages" else (parent, "items")
            count = counted(len(target), noun.removesuffix("s"))
            raise _Refused(f"{field_path(loc)}: {owner} has {count}")
    elif not isinstance(target, dict):
        raise _Refused(f"{parent} is {shown(target)}, not a mapping")
    elif isinstance(part, int):
        raise _Refused(f"{parent} is a mapping: expected a field, got index {part}")
