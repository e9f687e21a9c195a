"""Plain text for language modelling: `{text}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.data.json_values import EmptyRow, FormError, kind_name
from finetune_trainer.data.row_kinds import Example, RowKind

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields


def normalise(fields: Fields) -> Example:
    """Return the row as `{text}`."""
    return {"text": plain_text(fields.need("text"))}


def plain_text(value: Any) -> str:
    """Return the value, which must be a string.

    Raises:
        FormError: it is not a string.
        EmptyRow: it is empty.
    """
    if not isinstance(value, str):
        raise FormError(f"`text` is {kind_name(value)}, expected a string")
    if not value:
        raise EmptyRow("empty")
    return value


KIND = RowKind(needed="`text`", normalise=normalise, needs_answer=False, limit_field="blockSize", overflow_hint="")
