"""Parse dialogues that are stored in one string."""

from __future__ import annotations

import re

from finetune_api.data import Transcript
from finetune_trainer.data.json_values import FormError
from finetune_trainer.data.messages import Message


def parse_transcript(text: str, transcript: Transcript) -> list[Message]:
    """Return the turns of a dialogue in one string; white space around a turn is not part of it.

    Raises:
        FormError: the text has no marker, or other text before the first one.
    """
    markers = {transcript.user: "user", transcript.assistant: "assistant"}
    pieces = re.split(
        "(" + "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)) + ")", text
    )
    if len(pieces) == 1 or pieces[0].strip():
        raise FormError(f"a transcript must begin with {transcript.user!r} or {transcript.assistant!r}")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": markers[marker], "content": content.strip()} for marker, content in turns]
