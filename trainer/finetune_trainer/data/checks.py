"""Check a spec's data before a job requests resources: without a tokenizer, and on a sample of large files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import fsspec

from finetune_api.data import DataSpec
from finetune_api.problems import Problem, did_you_mean
from finetune_api.stages import PromptSpec
from finetune_trainer.data.prompts import has_reference
from finetune_trainer.data.readers import Row
from finetune_trainer.data.row_formats import EmptyRow, Example, FormError, Kind, normalise
from finetune_trainer.data.sources import Located, join_row, locate, source_rows
from finetune_trainer.errors import UserError

SAMPLE_ROWS = 1000
SMALL = 64 << 20
MAX_FAULTS = 3


@dataclass
class _Seen:
    """What the checked rows contain."""

    rows: int = 0
    usable: int = 0
    identical: int = 0
    pairs: int = 0
    prompts: set[type] = field(default_factory=set)
    unjoined: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)


def inspect(spec: DataSpec, kind: Kind, where: str, base_dir: Path, *, referenced: bool = False) -> list[Problem]:
    """Return every fault found in a spec's data.

    Sources of up to 64 MiB are read completely; of larger ones and of Hub datasets, the first 1000 rows are read.
    Faults in the data are returned, not raised.

    Args:
        where: the spec's path, such as `stages[1].sft.data`.
        referenced: whether each row must have an answer.

    Raises:
        LookupError: the kind of rows is unknown.
    """
    located, problems = locate(spec, where, base_dir)
    numbers = {id(source): index for index, source in enumerate(spec.sources)}
    looked = []
    for one in located:
        seen, found = _look(one, f"{where}.sources[{numbers[id(one.source)]}]", spec, kind, referenced)
        looked.append(seen)
        problems += found
    return problems + _identical(looked, where) + _mixed(looked, where) + _too_few(looked, problems, spec, where)


def _look(located: Located, where: str, spec: DataSpec, kind: Kind, referenced: bool) -> tuple[_Seen, list[Problem]]:
    seen = _Seen()
    try:
        for row, place in _rows(located):
            seen.rows += 1
            _see(row, place, located, where, spec, kind, seen, referenced)
    except UserError as error:
        return seen, [Problem(where, problem.message) for problem in error.problems]
    except OSError as error:
        return seen, [Problem(where, f"can't be read: {error}")]
    return seen, _faults(seen, located, where)


def _rows(located: Located) -> Iterator[tuple[Row, str]]:
    rows = ((row, place) for row, _, place in source_rows(located, 0, streaming=True))
    return rows if _is_small(located) else islice(rows, SAMPLE_ROWS)


def _is_small(located: Located) -> bool:
    if located.source.hub is not None:
        return False
    return sum(int(fsspec.core.url_to_fs(file.url)[0].size(file.url) or SMALL) for file in located.files) <= SMALL


def _see(
    row: Row, place: str, located: Located, where: str, spec: DataSpec, kind: Kind, seen: _Seen, referenced: bool
) -> None:
    try:
        joined = join_row(row, located, where)
    except UserError:
        seen.unjoined.append(place)
        return
    try:
        example = normalise(joined, spec, kind)
        if referenced and not has_reference(example):
            raise FormError("the row has no reference: expected an assistant's answer, or `prompt` and `completion`")
    except EmptyRow:
        return
    except FormError as error:
        seen.forms[str(error)] += 1
        seen.first.setdefault(str(error), place)
        return
    seen.usable += 1
    _see_form(example, seen)


def _see_form(example: Example, seen: _Seen) -> None:
    if "chosen" in example:
        seen.pairs += 1
        seen.identical += example["chosen"] == example["rejected"]
    if "columns" in example:
        seen.prompts.add(type(example["prompt"]))


def _faults(seen: _Seen, located: Located, where: str) -> list[Problem]:
    if not seen.rows:
        return [Problem(where, f"{_name(located)} is empty: it has no rows")]
    found = [
        Problem(where, f"{seen.first[message]}: {message}" + (f" (and {count - 1} more rows)" if count > 1 else ""))
        for message, count in islice(seen.forms.items(), MAX_FAULTS)
    ]
    if seen.unjoined:
        found.append(_unjoined(seen, located, where))
    return found


def _unjoined(seen: _Seen, located: Located, where: str) -> Problem:
    join = located.source.join
    assert join is not None
    return Problem(
        f"{where}.join",
        f"{len(seen.unjoined)} of {seen.rows} rows find no row with the same `{join.key}` in {join.file}; "
        f"the first is {seen.unjoined[0]}",
    )


def _identical(looked: list[_Seen], where: str) -> list[Problem]:
    identical, pairs = sum(seen.identical for seen in looked), sum(seen.pairs for seen in looked)
    if 2 * identical <= pairs:
        return []
    return [Problem(where, f"chosen equals rejected in {identical} of {pairs} pairs: there is no preference to learn")]


def _mixed(looked: list[_Seen], where: str) -> list[Problem]:
    if len(set[type]().union(*(seen.prompts for seen in looked))) < 2:
        return []
    return [Problem(where, "some prompts are plain texts and some are conversations: make them all the same")]


def _too_few(looked: list[_Seen], problems: list[Problem], spec: DataSpec, where: str) -> list[Problem]:
    if problems:
        return []
    usable = sum(seen.usable for seen in looked)
    if not usable:
        return [Problem(where, "no row has anything to train on")]
    if spec.validation_split and usable < 2:
        return [Problem(f"{where}.validationSplit", "there is 1 row, so none can be held out: set evalData")]
    return []


def _name(located: Located) -> str:
    source = located.source
    return source.file or source.directory or source.uri or source.hub or "inline"


def column_problems(stage: PromptSpec, column: str, where: str, place: str, base_dir: Path) -> list[Problem]:
    """Return a problem for each data field of a stage whose first prompts lack a required column.

    Args:
        where: the field that names the column.
        place: the stage's path, such as `stages[2].rlhf`.
    """
    problems = []
    for name, spec in (("data", stage.data), ("evalData", stage.eval_data)):
        if spec is None or any(source.stage is not None for source in spec.sources):
            continue
        there = _columns(spec, f"{place}.{name}", base_dir)
        if there is not None and column not in there:
            others = ", ".join(f"`{other}`" for other in there) or "none"
            message = f"no column `{column}` in {place}.{name}{did_you_mean(column, there)}; its prompts have {others}"
            problems.append(Problem(where, message))
    return problems


def _columns(spec: DataSpec, where: str, base_dir: Path) -> dict[str, None] | None:
    """Return the columns of the first prompts; None where no row can be read, which `inspect` reports."""
    located, _ = locate(spec, where, base_dir)
    found: dict[str, None] | None = None
    for one in located:
        try:
            for row, _ in islice(_rows(one), 20):
                found = (found or {}) | dict.fromkeys(normalise(join_row(row, one, where), spec, "prompt")["columns"])
        except (UserError, OSError, ValueError):
            continue
    return found
