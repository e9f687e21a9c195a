"""Redact secrets in text that leaves the process: status, termination messages, reports."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 6
MARK = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CONNECTION_STRING", re.I)
_NOT_SECRET = re.compile(r"_(FILE|PATH|MODE|DIR)$|^TOKENIZERS_", re.I)
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"  # PEM
    r"|\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abeprs]-[A-Za-z0-9-]{10,}|\bAIza[A-Za-z0-9_-]{30,}"  # OpenAI, Slack, Google
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{16,}"  # GitHub, GitLab
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # JSON web tokens, such as service accounts'
    r"|(?<=://)[^/\s:@'\"]*:[^/\s'\"]+(?=@)"  # user:password@host
    r"|(?<=\b[Bb]earer )[A-Za-z0-9._~+/=-]{8,}|(?<=\b[Bb]asic )[A-Za-z0-9+/=]{8,}",
    re.DOTALL,
)
_NAMED = re.compile(
    rf"""(?P<name>\b[\w.-]*(?:secret|passwd|password|pwd|credential|signature|connection_?string
        |(?:auth|access|api|hub|hf|session|security|refresh|id)[_-]?token
        |(?:api|access|account|private|secret|encryption)[_-]?key(?:[_-]?id)?)s?
        ["']?\s*[=:]\s*["']?)
        (?P<value>[^\s"',;&)}}\]]{{{SHORTEST},}})""",
    re.IGNORECASE | re.VERBOSE,
)
"""Values after the name of a secret: `password=...`, `"aws_secret_access_key": "..."`, `&X-Amz-Signature=...`. The name
`token` alone does not match, because every tokenizer configuration contains it."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text with secrets replaced by `MARK`.

    Secrets are the values of secret environment variables, and texts in known formats of tokens.
    """
    secrets = {value for name, value in environment.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, MARK)
    return _NAMED.sub(rf"\g<name>{MARK}", _SHAPES.sub(MARK, text))


def is_credential(name: str, value: str) -> bool:
    """Return whether a variable contains a credential that belongs into a Secret. A path to a file does not count."""
    assignment = f"{name}={value}"
    return not value.startswith("/") and redact(assignment, {}) != assignment


def is_secret(name: str) -> bool:
    """Return whether the name of a variable is that of a secret."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)
