"""The only module that writes to the API server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kubernetes.aio.client import ApiException

from finetune_operator.api import Api, reason_of
from finetune_operator.core.conditions import Reason
from finetune_operator.core.snapshot import owner_uid
from finetune_operator.log_lines import operation_line
from finetune_operator.plan import Annotate, Create, Delete, Operation, SetFinalizers

Json = dict[str, Any]
CONFLICT, UNPROCESSABLE, FORBIDDEN, NOT_FOUND, BAD_REQUEST, TOO_LARGE = 409, 422, 403, 404, 400, 413
log = logging.getLogger(__name__)


class Refused(Exception):
    """The API server refuses an object: permanently (`REJECTED`) or in the cluster's present state (`FORBIDDEN`)."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Outdated(Exception):
    """The job has changed since the decision, or is gone: reconcile it again."""


async def apply(api: Api, operations: Sequence[Operation]) -> list[Json]:
    """Apply the operations in order and return the API server's answers. Applying them again changes nothing.

    Raises:
        Refused: the API server refused an object; the operations after it were not applied.
        Outdated: the job is gone, is another one of the same name, or has changed.
        ApiException, OSError: the API server failed or did not answer.
    """
    answers = []
    for operation in operations:
        answers.append(await _apply(api, operation))
        log.info("applied: %s", operation_line(operation))
    return answers


async def _apply(api: Api, operation: Operation) -> Json:
    if isinstance(operation, Create):
        return await _create(api, operation)
    if isinstance(operation, Delete):
        return await _delete(api, operation)
    if isinstance(operation, SetFinalizers):
        body = {"metadata": {"resourceVersion": operation.version, "finalizers": list(operation.finalizers)}}
        return await _merge(api, operation.path, body)
    if isinstance(operation, Annotate):
        return await api.merge(operation.path, {"metadata": {"annotations": operation.annotations}})
    metadata = {"uid": operation.uid, "resourceVersion": operation.version}
    return await _merge(api, operation.path, {"metadata": metadata, "status": operation.status})


async def _create(api: Api, operation: Create) -> Json:
    try:
        return await api.create(operation.path, operation.body)
    except ApiException as error:
        reason, message = reason_of(error)
        kind = f"{operation.body['kind']} {operation.body['metadata']['name']}"
        if error.status == CONFLICT and reason == "AlreadyExists":
            return await _existing(api, operation, kind) if operation.run else {}
        if error.status in (UNPROCESSABLE, BAD_REQUEST, TOO_LARGE):
            raise Refused(Reason.REJECTED, f"{kind}: {message}") from error
        if error.status in (FORBIDDEN, CONFLICT) or "failed calling webhook" in message:
            raise Refused(Reason.FORBIDDEN, f"{kind}: {message}") from error
        if error.status == NOT_FOUND:
            raise Outdated(message) from error
        raise


async def _existing(api: Api, operation: Create, kind: str) -> Json:
    """Return the main object that exists already, if it belongs to the same job."""
    found = await api.get(f"{operation.path}/{operation.body['metadata']['name']}")
    if found is None or owner_uid(found["metadata"]) != owner_uid(operation.body["metadata"]):
        raise Refused(Reason.FORBIDDEN, f"{kind} exists already and belongs to another owner: waiting for its deletion")
    return found


async def _delete(api: Api, operation: Delete) -> Json:
    """Delete in the foreground by default: the object stays until its pods have ended within their grace period."""
    policy = "Foreground" if operation.children_first else "Background"
    options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy}
    if operation.uid:
        options["preconditions"] = {"uid": operation.uid}
    try:
        return await api.delete(operation.path, options)
    except ApiException as error:
        if error.status == NOT_FOUND:
            return {}
        if error.status == CONFLICT:
            raise Outdated(reason_of(error)[1]) from error
        raise


async def _merge(api: Api, path: str, body: Json) -> Json:
    try:
        return await api.merge(path, body)
    except ApiException as error:
        if error.status in (NOT_FOUND, CONFLICT):
            raise Outdated(reason_of(error)[1]) from error
        raise
