"""Takes secrets out of text that leaves the process: status, termination messages, reports."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 6
MARK = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CONNECTION_STRING", re.I)
_NOT_SECRET = re.compile(r"_(FILE|PATH|MODE|DIR)$|^TOKENIZERS_", re.I)
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the values of variables that are named like secrets, and without what looks like one."""
    secrets = {value for name, value in environment.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, MARK)
    return _SHAPES.sub(MARK, text)


def is_secret(name: str) -> bool:
    """Whether a variable of that name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)
