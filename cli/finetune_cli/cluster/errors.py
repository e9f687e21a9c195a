"""What goes wrong between a command and an API server, and what it says to a person."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.job import API_VERSION, KIND, PLURAL
from finetune_api.problems import Problem
from finetune_cli.outcome import CommandFailed
from finetune_trainer.errors import UserError

Json = dict[str, Any]
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT, GONE, INVALID, TOO_MANY = 401, 403, 404, 409, 410, 422, 429
_UNKNOWN_FIELD = re.compile(r'(unknown|duplicate) field "([^"]+)"')


class Unreachable(Exception):
    """No answer from the API server, or one that broke off."""


@dataclass
class ApiError(Exception):
    """An answer that is a refusal, as Kubernetes' `Status` has it."""

    code: int
    reason: str
    message: str
    details: Json

    def __str__(self) -> str:
        return self.message or f"{self.code} {self.reason}"

    @property
    def passing(self) -> bool:
        """Whether the same request may work a little later."""
        return self.code >= 500 or self.code in (TOO_MANY, GONE)


def explained(error: Exception, server: str) -> UserError | CommandFailed:
    """The error as one of those that the command line knows.

    Args:
        error: an `ApiError` or an `Unreachable`.
        server: the API server's address.
    """
    if not isinstance(error, ApiError):
        return CommandFailed(f"{server} does not answer: {error}")
    if error.passing:
        return CommandFailed(f"{server} answers {error.code}: {error}")
    return UserError(list(_problems(error, server)))


def _problems(error: ApiError, server: str) -> Iterator[Problem]:
    if error.code == UNAUTHORIZED:
        yield Problem("", f"{server} does not accept the credentials of this context: log in again ({error})")
    elif error.code == FORBIDDEN:
        yield Problem("", f"{error}: ask whoever runs the cluster for that right")
    elif error.code == NOT_FOUND and not error.details.get("name"):
        yield Problem("", f"the cluster at {server} has no {KIND} ({API_VERSION}): install finetune-operator's chart")
    elif error.code == INVALID and error.details.get("causes"):
        yield from (Problem(_field(cause), cause.get("message", "")) for cause in error.details["causes"])
    elif unknown := _UNKNOWN_FIELD.findall(error.message):
        for kind, path in unknown:
            fault = "is given twice" if kind == "duplicate" else f"the {KIND} of this cluster has no such field"
            yield Problem(path.removeprefix("spec."), fault)
    else:
        yield Problem("", str(error))


def _field(cause: Json) -> str:
    """The field as a job file's messages write it."""
    field = str(cause.get("field", ""))
    return "" if field == "<nil>" else field.removeprefix("spec.")


def is_missing(error: ApiError) -> bool:
    """Whether it says that the job is not there (rather than its namespace, or the whole API)."""
    return error.code == NOT_FOUND and error.details.get("kind") == PLURAL and bool(error.details.get("name"))
