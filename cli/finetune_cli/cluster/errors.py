"""Errors of requests to the API server, and their messages."""

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
    """The API server did not respond, or the connection was lost."""


@dataclass
class ApiError(Exception):
    """An error response: the fields of Kubernetes' `Status`."""

    code: int
    reason: str
    message: str
    details: Json

    def __str__(self) -> str:
        return self.message or f"{self.code} {self.reason}"

    @property
    def transient(self) -> bool:
        """Whether a retry of the same request may succeed."""
        return self.code >= 500 or self.code in (TOO_MANY, GONE)


def explained(error: Exception, server: str) -> UserError | CommandFailed:
    """Convert an error to a UserError, or to a CommandFailed if it is not the user's fault.

    Args:
        error: an `ApiError` or an `Unreachable`.
        server: URL of the API server.
    """
    if not isinstance(error, ApiError):
        return CommandFailed(f"{server} does not respond: {error}")
    if error.transient:
        return CommandFailed(f"{server} responds with status {error.code}: {error}")
    return UserError(list(_problems(error, server)))


def _problems(error: ApiError, server: str) -> Iterator[Problem]:
    if error.code == UNAUTHORIZED:
        yield Problem("", f"{server} does not accept the credentials of this context: log in again ({error})")
    elif error.code == FORBIDDEN:
        yield Problem("", f"{error}: ask the administrator of the cluster for this permission")
    elif error.code == NOT_FOUND and not error.details.get("name"):
        yield Problem("", f"the cluster at {server} has no {KIND} ({API_VERSION}): install the chart finetune-operator")
    elif error.code == INVALID and error.details.get("causes"):
        yield from (Problem(_field(cause), cause.get("message", "")) for cause in error.details["causes"])
    elif unknown := _UNKNOWN_FIELD.findall(error.message):
        for kind, path in unknown:
            fault = "is set twice" if kind == "duplicate" else f"is not a field of {KIND} on this cluster"
            yield Problem(path.removeprefix("spec."), fault)
    else:
        yield Problem("", str(error))


def _field(cause: Json) -> str:
    """Return the path of a field as in messages about a job file."""
    field = str(cause.get("field", ""))
    return "" if field == "<nil>" else field.removeprefix("spec.")


def is_missing(error: ApiError) -> bool:
    """Return whether the job does not exist (and not its namespace or the API)."""
    return error.code == NOT_FOUND and error.details.get("kind") == PLURAL and bool(error.details.get("name"))
