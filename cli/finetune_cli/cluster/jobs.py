"""FineTuneJobs on a cluster: read, make, change and delete them, with errors for people."""

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
    """The FineTuneJobs of one namespace; `namespace` None stands for all of them, for lists.

    Every method raises UserError where the request is wrong and CommandFailed where the API server is in trouble.
    """

    def __init__(self, cluster: Cluster, namespace: str | None) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def list(self) -> list[Json]:
        """All jobs, by namespace and name."""
        with self.telling():
            found = self.cluster.get(self._path())
        kind = {"apiVersion": API_VERSION, "kind": KIND}
        return sorted((kind | item for item in found["items"]), key=_place)

    def read(self, name: str) -> Json:
        """One job."""
        if not re.match(NAME_PATTERN, name):
            raise self.missing(name)
        with self.telling(name):
            return self.cluster.get(self._path(name))

    def changes(
        self, name: str | None = None, deadline: float | None = None, note: Callable[[str], None] = no_note
    ) -> Iterator[Objects]:
        """The jobs, or the one of that name, as they are and after each change; see `watching.follow`."""
        query = {} if name is None else {"fieldSelector": f"metadata.name={name}"}
        with self.telling(name):
            yield from follow(self.cluster, self._path(), query, deadline=deadline, note=note)

    def create(self, job: FineTuneJob, *, dry_run: bool = False) -> Json:
        """Make the job, or have the API server check it."""
        with self.telling(job.metadata.name):
            return self.cluster.send("POST", self._path(), _strict(dry_run), self._body(job))

    def update(self, job: FineTuneJob, *, dry_run: bool = False) -> Json:
        """Give a job that exists the spec, labels and annotations of `job`; the API server refuses what can't change.

        Labels and annotations that `job` does not have stay.
        """
        name, body = job.metadata.name, self._body(job)
        for attempt in range(UPDATE_TRIES):
            with self.telling(name):
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
        with self.telling(name):
            return self.cluster.send("PATCH", self._path(name), None, patch, MERGE_PATCH)

    def delete(self, name: str) -> None:
        """Delete the job; its children follow it."""
        with self.telling(name):
            self.cluster.send("DELETE", self._path(name), None, {"propagationPolicy": "Background"})

    @contextmanager
    def telling(self, name: str | None = None) -> Iterator[None]:
        """Errors of the API server become those that the command line knows."""
        try:
            yield
        except ApiError as error:
            if name is not None and is_missing(error):
                raise self.missing(name) from error
            raise explained(error, self.cluster.server) from error
        except Unreachable as error:
            raise explained(error, self.cluster.server) from error

    def missing(self, name: str) -> UserError:
        """The error for a job that is not there, with the name that was meant, if one is near."""
        message = f"no job {name!r} in namespace {self.namespace}"
        try:
            names = [item["metadata"]["name"] for item in self.list()]
        except (UserError, CommandFailed):  # whoever may not list gets no hint
            return UserError(message)
        close = nearest(name, names)
        if close is not None:
            return UserError(f"{message}: did you mean `{close}`?")
        if not names:
            return UserError(f"{message}, which has none; another namespace? (-n NAMESPACE, or `finetune status -A`)")
        shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
        return UserError(f"{message}, which has {shown}")

    def _path(self, name: str | None = None) -> str:
        namespace = f"/namespaces/{quote(self.namespace, safe='')}" if self.namespace is not None else ""
        return f"/apis/{GROUP}/{VERSION}{namespace}/{PLURAL}" + (f"/{quote(name, safe='')}" if name else "")

    def _body(self, job: FineTuneJob) -> Json:
        """What the user wrote and no defaults: those are the cluster's to fill in."""
        body = job.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude={"status"})
        body["metadata"]["namespace"] = self.namespace
        return body


def _strict(dry_run: bool) -> dict[str, str]:
    """A field that an older CRD doesn't have is an error, never dropped."""
    return {"fieldValidation": "Strict", "fieldManager": "finetune"} | ({"dryRun": "All"} if dry_run else {})


def _place(item: Json) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]
