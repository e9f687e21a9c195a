"""Single answers labelled good or bad: `{prompt, completion, label}`, or a pair, which has one of each.

A labelled row is normalised to `{prompt, completion, label}` with a bool `label`, a pair as in `preference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.data.json_values import FormError
from finetune_trainer.data.messages import Message, without_train
from finetune_trainer.data.row_kinds import IDENTICAL, NOTHING, Columns, Example, RowKind, preference, sft

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields
    from finetune_trainer.data.encode import Encoder
    from finetune_trainer.data.report import Stats

LABEL = "label"
NEEDED = "`prompt`, `completion` and `label`, or `chosen` and `rejected`"
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def normalise(fields: Fields) -> Example:
    """Return the row as `{prompt, completion, label}`, or as `{prompt, chosen, rejected}` if it is a pair."""
    if {"chosen", "rejected"} <= fields.values.keys() and LABEL not in fields.row:
        return preference.normalise(fields)
    example = sft.normalise(fields)
    if "text" in example:
        raise FormError(f"the row is plain text; this stage needs {NEEDED}")
    if "messages" in example:
        example = _last_answer(example["messages"])
    return {**example, LABEL: read_label(fields.row)}


def read_label(row: dict[str, Any]) -> bool:
    """Return a row's label as a bool: it is a bool, 0 or 1, or one of these as text.

    Raises:
        FormError: it is something else, or there is none.
    """
    value = row.get(LABEL)
    if value is None:
        columns = ", ".join(f"`{name}`" for name in row)
        raise FormError(f"no `{LABEL}`. The row has {columns}; this stage needs {NEEDED}")
    found = _LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise FormError(f"`{LABEL}` is {value!r}, expected true for a good answer or false for a bad one (or 1 or 0)")
    return found


def _last_answer(messages: list[Message]) -> Example:
    """Return a conversation split into its last message, the answer, and the messages before it."""
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise FormError("the conversation does not end with an assistant's answer to label")
    return {"prompt": without_train(messages[:-1]), "completion": messages[-1:]}


def encode(encoder: Encoder, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
    """Yield `prompt_ids`, `completion_ids`, `completion_mask` and `label` ([0] or [1]), int32, of each answer."""
    if LABEL in example:
        yield from _answer(encoder, number, example, "completion", example[LABEL], stats)
        return
    if example["chosen"] == example["rejected"]:
        stats.drop(IDENTICAL, 0)
        return
    for name, label in (("chosen", True), ("rejected", False)):
        yield from _answer(encoder, number, example, name, label, stats)


def _answer(encoder: Encoder, number: int, example: Example, name: str, label: bool, stats: Stats) -> Iterator[Columns]:
    prompt, ((ids, mask),) = encoder.answers(example, (name,), stats)
    total, limit = len(prompt) + len(ids), encoder.encoding.limit
    stats.longest = max(stats.longest, total)
    if limit is not None and total > limit and not encoder.may_cut(number, total, stats):
        return
    room = None if limit is None else max(limit - len(prompt), 0)
    prompt, ids, mask = prompt[:limit], ids[:room], mask[:room]
    if not sum(mask):
        stats.drop(NOTHING, total)
        return
    _count(len(prompt) + len(ids), sum(mask), total, stats)
    columns = {"prompt_ids": prompt, "completion_ids": ids, "completion_mask": mask, LABEL: [int(label)]}
    yield {column: np.array(values, np.int32) for column, values in columns.items()}


def _count(kept: int, trained: int, total: int, stats: Stats) -> None:
    stats.kept += 1
    stats.tokens += kept
    stats.trained_tokens += trained
    stats.truncated_examples += kept < total
    stats.truncated_tokens += total - kept


KIND = RowKind(needed=NEEDED, normalise=normalise, encode=encode, pairs="yes")
