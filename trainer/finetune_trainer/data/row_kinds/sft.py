"""Dialogues for supervised fine-tuning: `{messages}`, `{prompt, completion}` or `{text}`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from finetune_api.problems import nearest
from finetune_trainer.data.json_values import EmptyRow, FormError
from finetune_trainer.data.messages import Message
from finetune_trainer.data.prompt_boundary import put_system, split
from finetune_trainer.data.row_kinds import IGNORED, NOTHING, UNANSWERED, Columns, Example, RowKind
from finetune_trainer.data.row_kinds.text import plain_text
from finetune_trainer.data.transcripts import parse_transcript

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields
    from finetune_trainer.data.encode import Encoder, Ids
    from finetune_trainer.data.report import Stats


def normalise(fields: Fields) -> Example:
    """Return the row as `{messages}`, `{prompt, completion}` or `{text}`."""
    if "text" in fields.texts:
        return plain_or_transcript(fields)
    if {"prompt", "completion"} & fields.texts:
        prompt = put_system(fields.system, fields.turns("prompt", "user"))
        return {"prompt": prompt, "completion": fields.turns("completion", "assistant"), "templated": True}
    if "messages" in fields.values:
        return {"messages": conversation(fields)}
    if "prompt" in fields.values or "completion" in fields.values or "text" not in fields.values:
        return prompt_completion(fields)
    return plain_or_transcript(fields)


def conversation(fields: Fields) -> list[Message]:
    """Return the row's conversation, its system message first.

    Raises:
        EmptyRow: it has no messages.
    """
    messages = fields.turns("messages", "user")
    if not messages:
        raise EmptyRow("empty")
    return put_system(fields.system, messages)


def plain_or_transcript(fields: Fields) -> Example:
    """Return the row's text as `{text}`, or its parsed transcript as `{messages}`."""
    text = plain_text(fields.values["text"])
    if fields.spec.transcript is None:
        return {"text": text}
    return {"messages": put_system(fields.system, parse_transcript(text, fields.spec.transcript))}


def prompt_completion(fields: Fields) -> Example:
    """Return the row as `{prompt, completion}`, both strings or both lists of messages."""
    if "prompt" not in fields.values and "completion" not in fields.values:
        raise FormError(fields.not_there(_likeliest_column(fields)))
    prompt, completion = fields.need("prompt"), fields.need("completion")
    strings = isinstance(prompt, str) and isinstance(completion, str)
    if completion == "":
        raise EmptyRow("empty")
    if strings and not fields.is_chat and fields.spec.transcript is None:
        return {"prompt": prompt, "completion": completion}
    made = split(prompt_value(fields), [fields.turns("completion", "assistant")], fields.spec.columns.prompt)
    example = {"prompt": put_system(fields.system, made.prompt), "completion": made.answers[0]}
    return {**example, "templated": True} if strings and fields.spec.transcript is None else example


def _likeliest_column(fields: Fields) -> str:
    """Return the standard column that the row most likely has under another name."""
    columns = fields.spec.columns
    names = [name for name in ("messages", "prompt", "text") if nearest(getattr(columns, name), fields.row)]
    return (names or ["messages"])[0]


def prompt_value(fields: Fields) -> str | list[Message] | None:
    """Return the row's prompt: a string, messages, or None."""
    prompt = fields.values.get("prompt")
    if prompt is None or (isinstance(prompt, str) and fields.spec.transcript is None):
        return prompt
    return fields.turns("prompt", "user")


def encode(encoder: Encoder, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
    """Yield `input_ids` and `labels`, int32, of each piece of a dialogue that has loss."""
    encoded = encoder.dialogue(example)
    ids, mask = encoded.ids, encoded.mask
    stats.note(encoded.notes)
    stats.longest = max(stats.longest, len(ids))
    for piece, piece_mask in _pieces(encoder, number, ids, mask, stats):
        trained = sum(piece_mask[1:])
        if not trained:
            stats.drop(NOTHING if any(mask) else UNANSWERED, len(piece))
            continue
        stats.kept += 1
        stats.tokens += len(piece)
        stats.trained_tokens += trained
        tokens, keep = np.array(piece, np.int32), np.array(piece_mask, bool)
        keep[0] = False  # it has no predecessor; in a packed row it would be predicted from another document
        yield {"input_ids": tokens, "labels": np.where(keep, tokens, IGNORED).astype(np.int32)}


def _pieces(encoder: Encoder, number: int, ids: Ids, mask: Ids, stats: Stats) -> list[tuple[Ids, Ids]]:
    """Return the pieces of a dialogue within the limit: all of it, a truncated piece, several pieces, or none."""
    limit = encoder.encoding.limit
    if limit is None or len(ids) <= limit:
        return [(ids, mask)]
    if encoder.encoding.overflow == "split":
        return [(ids[at : at + limit], mask[at : at + limit]) for at in range(0, len(ids), limit)]
    if not encoder.may_cut(number, len(ids), stats):
        return []
    if any(mask[1:limit]):
        stats.truncated_examples += 1
        stats.truncated_tokens += len(ids) - limit
    else:
        stats.dropped_tokens += len(ids) - limit
    return [(ids[:limit], mask[:limit])]


KIND = RowKind(
    needed="`messages`, `prompt` and `completion`, or `text`",
    normalise=normalise,
    encode=encode,
    overflow_hint="Set maxLength up to the model's context to cut them, or overflow: truncate, drop or split",
)
