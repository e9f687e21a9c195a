"""Generate pairs of question and query on a database or a graph; only queries that run are kept."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from finetune_api.stages import QueryPairs
from finetune_trainer.queries.result import QueryResult
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Execute, Failed, Item, Made, Outcome, Rejected, Work
from finetune_trainer.synthesis.parse import pairs_of
from finetune_trainer.synthesis.prompts import prompt
from finetune_trainer.synthesis.teacher_requests import GaveUp, Teacher

LEVELS = (
    "simple (one table or label, a condition or two)",
    "moderate (two or three tables or patterns joined, sorting, limits, grouping)",
    "hard (several joins or paths, aggregates over groups, subqueries, negation, dates)",
)
DIALECTS = {"sqlite": "SQLite", "duckdb": "DuckDB"}


def pair_items(method: str, engine: str, schema: str, spec: QueryPairs, teacher: Teacher) -> list[Item]:
    """Return an item for each request, which asks for a set of pairs; the difficulty cycles over the sets."""
    sizes = [spec.pairs_per_request] * (spec.num_pairs // spec.pairs_per_request)
    if spec.num_pairs % spec.pairs_per_request:
        sizes.append(spec.num_pairs % spec.pairs_per_request)
    values = {"engine": DIALECTS.get(engine, engine), "schema": schema, "total": len(sizes)}
    return [
        Item(str(number), partial(_work, method, number, {**values, "count": size}, spec, teacher))
        for number, size in enumerate(sizes)
    ]


def pair_requests(spec: QueryPairs) -> int:
    """Return the number of requests, each for one set of pairs."""
    return math.ceil(spec.num_pairs / spec.pairs_per_request)


def _work(method: str, number: int, values: dict[str, Any], spec: QueryPairs, teacher: Teacher) -> Work:
    level = LEVELS[number % len(LEVELS)]
    source = {"method": method, "set": number, "level": level.split()[0], "teacher": teacher.name}
    try:
        pairs, asked = yield from teacher.objects(
            method, lambda value: pairs_of(value, "question", "query"), **values, number=number + 1, level=level
        )
    except GaveUp as error:
        return [Rejected(error.reason, error.last, source)]
    outcomes: list[Outcome] = []
    for position, pair in enumerate(pairs[: values["count"]]):
        provenance = {**source, "pair": position, **asked}
        outcomes.append((yield from _execute(pair, values["schema"], spec, provenance)))
    return outcomes


def _execute(pair: dict[str, str], schema: str, spec: QueryPairs, provenance: dict[str, Any]) -> Any:
    example = f"{pair['question']}\n→ {pair['query']}"
    if not pair["question"] or not pair["query"]:
        return Rejected(reasons.EMPTY, example, provenance)
    result = yield Execute(pair["query"])
    if isinstance(result, Failed):
        return Rejected(result.reason, f"{example}\n{result.detail}", provenance)
    assert isinstance(result, QueryResult)
    if spec.require_rows and not result.rows:
        return Rejected(reasons.NO_ROWS, example, provenance)
    shown = prompt("query-row", schema=schema, question=pair["question"])
    messages = ({"role": "user", "content": shown}, {"role": "assistant", "content": pair["query"]})
    returned = {"columns": list(result.columns), "rows": len(result.rows), "more": result.more}
    return Made(messages, pair["question"], pair, {**provenance, "returned": returned})
