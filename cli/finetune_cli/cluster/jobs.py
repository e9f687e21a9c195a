"""Read, create, change and delete FineTuneJobs on a cluster, with readable errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from finetune_api.job import API_VERSION, GROUP, KIND, NAME_PATTERN, PLURAL, VERSION, FineTuneJob
from finetune_api.problems import nearest
from finetune_cli.cluster.connection import MERGE_PATCH, Cluster
from finetune_cli.cluster.errors import CONFLICT, ApiError, Unreachable, explained, is_missing
from finetune_cli.cluster.watching import Objects, follow, no_note
from finetune_cli.outcome import CommandFailed
from finetune_trainer.errors import UserError

Json = dict[str, Any]
NAMES_SHOWN = 5
UPDATE_TRIES = 5


class Jobs:
    """FineTuneJobs of one namespace, or of all namespaces (`namespace` None, for lists only).

    Every method raises UserError if the request is invalid, and CommandFailed if the API server is not available.
    """

    def __init__(self, cluster: Cluster, namespace: str | None) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def list(self) -> list[Json]:
        """Return all jobs, sorted by namespace and name."""
        with self.explained_errors():
            listed = self.cluster.get(self._path())
        kind = {"apiVersion": API_VERSION, "kind": KIND}
        return sorted((kind | item for item in listed["items"]), key=_sort_key)

    def read(self, name: str) -> Json:
        """Return one job."""
        if not re.match(NAME_PATTERN, name):
            raise self.missing(name)
        with self.explained_errors(name):
            return self.cluster.get(self._path(name))

    def changes(
        self, name: str | None = None, deadline: float | None = None, note: Callable[[str], None] = no_note
    ) -> Iterator[Objects]:
        """Yield the jobs, or the one of that name, now and after each change; see `watching.follow`."""
        query = {} if name is None else {"fieldSelector": f"metadata.name={name}"}
        with self.explained_errors(name):
            yield from follow(self.cluster, self._path(), query, deadline=deadline, note=note)

    def create(self, job: FineTuneJob, *, dry_run: bool = False) -> Json:
        """Create the job, or only let the API server validate it."""
        with self.explained_errors(job.metadata.name):
            return self.cluster.send("POST", self._path(), _strict(dry_run), self._body(job))

    def update(self, job: FineTuneJob, *, dry_run: bool = False) -> Json:
        """Replace the spec of an existing job, and add the labels and annotations of `job`.

        The API server rejects changes of immutable fields. Labels and annotations that `job` does not set are kept.
        """
        name, body = job.metadata.name, self._body(job)
        for attempt in range(UPDATE_TRIES):
            with self.explained_errors(name):
                metadata = self.cluster.get(self._path(name))["metadata"]
                for kind in ("labels", "annotations"):
                    metadata[kind] = {**(metadata.get(kind) or {}), **body["metadata"].get(kind, {})}
                try:
                    return self.cluster.send("PUT", self._path(name), _strict(dry_run), body | {"metadata": metadata})
                except ApiError as error:
                    if error.code != CONFLICT or attempt == UPDATE_TRIES - 1:
                        raise
        raise AssertionError("the loop returns or raises")

    def suspend(self, name: str, wanted: bool) -> Json:
        """Set `runPolicy.suspend`."""
        patch = {"spec": {"runPolicy": {"suspend": wanted}}}
        with self.explained_errors(name):
            return self.cluster.send("PATCH", self._path(name), None, patch, MERGE_PATCH)

    def delete(self, name: str) -> None:
        """Delete the job. Kubernetes deletes its dependents in the background."""
        with self.explained_errors(name):
            self.cluster.send("DELETE", self._path(name), None, {"propagationPolicy": "Background"})

    @contextmanager
    def explained_errors(self, name: str | None = None) -> Iterator[None]:
        """Convert errors of the API server to UserError and CommandFailed."""
        try:
            yield
        except ApiError as error:
            if name is not None and is_missing(error):
                raise self.missing(name) from error
            raise explained(error, self.cluster.server) from error
        except Unreachable as error:
            raise explained(error, self.cluster.server) from error

    def missing(self, name: str) -> UserError:
        """Return the error for a job that does not exist, with a similar name if there is one."""
        message = f"no job {name!r} in namespace {self.namespace}"
        try:
            names = [item["metadata"]["name"] for item in self.list()]
        except (UserError, CommandFailed):  # no permission to list: no hint
            return UserError(message)
        close = nearest(name, names)
        if close is not None:
            return UserError(f"{message}: did you mean `{close}`?")
        if not names:
            return UserError(
                f"{message}, which has no jobs: check the namespace (-n NAMESPACE, or `finetune status -A`)"
            )
        shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        return UserError(f"{message}, which has {shown}")

    def _path(self, name: str | None = None) -> str:
        namespace = f"/namespaces/{quote(self.namespace, safe='')}" if self.namespace is not None else ""
        return f"/apis/{GROUP}/{VERSION}{namespace}/{PLURAL}" + (f"/{quote(name, safe='')}" if name else "")

    def _body(self, job: FineTuneJob) -> Json:
        """Return the fields that the user set. The API server adds the defaults."""
        body = job.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude={"status"})
        body["metadata"]["namespace"] = self.namespace
        return body


def _strict(dry_run: bool) -> dict[str, str]:
    """Return query parameters. With strict validation, a field that an older CRD lacks is an error."""
    return {"fieldValidation": "Strict", "fieldManager": "finetune"} | ({"dryRun": "All"} if dry_run else {})


def _sort_key(item: Json) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]
