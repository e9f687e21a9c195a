"""Pairs of a preferred and a rejected answer: `{prompt, chosen, rejected}`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.data.format_detection import forgotten_prompt
from finetune_trainer.data.json_values import FormError, kind_name
from finetune_trainer.data.prompt_boundary import put_system, split
from finetune_trainer.data.row_kinds import IDENTICAL, NOTHING, Columns, Example, RowKind
from finetune_trainer.data.row_kinds.sft import prompt_value

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields
    from finetune_trainer.data.encode import Encoder, Ids
    from finetune_trainer.data.report import Stats


def normalise(fields: Fields) -> Example:
    """Return the row as `{prompt, chosen, rejected}`, all strings or all lists of messages."""
    chosen, rejected = fields.need("chosen"), fields.need("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise FormError(f"`chosen` is {kind_name(chosen)} and `rejected` {kind_name(rejected)}")
    marked = bool({"prompt", "chosen", "rejected"} & fields.texts)
    strings = isinstance(chosen, str) and fields.spec.transcript is None
    strings = strings and not isinstance(fields.values.get("prompt"), list)
    if fields.values.get("prompt") is None and "prompt" not in fields.spec.columns.named:
        _refuse_forgotten_prompt(fields)
    if strings and not marked and not fields.is_chat:
        return _plain_pair(fields.values.get("prompt"), chosen, rejected)
    answers = [fields.turns(name, "assistant") for name in ("chosen", "rejected")]
    made = split(prompt_value(fields), answers, fields.spec.columns.prompt)
    prompt = put_system(fields.system, made.prompt)
    return {"prompt": prompt, "chosen": made.answers[0], "rejected": made.answers[1], "templated": marked or strings}


def _refuse_forgotten_prompt(fields: Fields) -> None:
    """Refuse a pair without a prompt whose row has a column that looks like the prompt."""
    column = forgotten_prompt(fields.row, fields.values["chosen"], fields.values["rejected"])
    if column is not None:
        raise FormError(
            f"the row has no `prompt`, and its answers do not repeat what column `{column}` says: set "
            f"`columns: {{prompt: {column}}}` if that is what they answer, else `columns: {{prompt: none}}`"
        )


def _plain_pair(prompt: Any, chosen: str, rejected: str) -> Example:
    if prompt is not None:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        return {"prompt": "", "chosen": chosen, "rejected": rejected}
    from trl.data_utils import extract_prompt

    pair: Example = extract_prompt({"chosen": chosen, "rejected": rejected})
    return pair


def encode(encoder: Encoder, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
    """Yield `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_mask` and `rejected_mask`, int32, of a pair."""
    if example["chosen"] == example["rejected"]:
        stats.drop(IDENTICAL, 0)
        return
    prompt, ((chosen, chosen_mask), (rejected, rejected_mask)) = encoder.answers(example, ("chosen", "rejected"), stats)
    whole = len(prompt) + max(len(chosen), len(rejected))
    stats.longest = max(stats.longest, whole)
    limit = encoder.encoding.limit
    total = len(prompt) + len(chosen) + len(rejected)
    if limit is not None and whole > limit and not encoder.may_cut(number, whole, stats):
        return
    room = None if limit is None else max(limit - len(prompt), 0)
    columns = {
        "prompt_ids": prompt[:limit],
        "chosen_ids": chosen[:room],
        "rejected_ids": rejected[:room],
        "chosen_mask": chosen_mask[:room],
        "rejected_mask": rejected_mask[:room],
    }
    yield from _keep(columns, total, stats)


def _keep(columns: dict[str, Ids], total: int, stats: Stats) -> Iterator[Columns]:
    kept = sum(len(columns[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    trained = sum(columns["chosen_mask"]), sum(columns["rejected_mask"])
    if not all(trained) or columns["chosen_ids"] == columns["rejected_ids"]:
        stats.drop(NOTHING, total)
        return
    stats.kept += 1
    stats.tokens += kept
    stats.trained_tokens += sum(trained)
    stats.truncated_examples += kept < total
    stats.truncated_tokens += total - kept
    yield {name: np.array(values, np.int32) for name, values in columns.items()}


KIND = RowKind(needed="`chosen` and `rejected`", normalise=normalise, encode=encode, pairs="only")
