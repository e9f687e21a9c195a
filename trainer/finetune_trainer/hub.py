"""Access to the Hugging Face hub, which distinguishes an outage from an error of the job.

If the hub does not respond, the libraries retry each of several files six times, for 23 s in total, and then raise the
same type of error as for a model that does not exist. One request for the repository's description, sent first,
distinguishes the cases at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finetune_api.problems import Problem
from finetune_trainer.errors import Outage, UserError

Kind = Literal["model", "dataset"]
TIMEOUT_SECONDS = 10.0
"""Timeout of the first request to the hub."""
_TOKEN = "run `hf auth login` or set HF_TOKEN (on a cluster: a Secret named in kubernetes.envFromSecrets)"
_outages: list[Outage] = []
"""The outage because of which this process uses only the cache, although HF_HUB_OFFLINE was not set."""


@contextmanager
def hub_access(name: str, where: str, revision: str | None = None, kind: Kind = "model") -> Iterator[None]:
    """Check that the hub has a repository, and translate the libraries' exceptions in the block that reads it.

    Args:
        name: a hub id, or a local directory, for which nothing is done.
        where: the field of the job that contains the name.
        revision: branch, tag or commit. Default: the main branch.
        kind: model or dataset.

    Raises:
        Outage: the hub does not respond or fails, and the repository is not in the cache.
        UserError: the repository or revision does not exist, access is denied, or HF_HUB_OFFLINE is set and the
            repository is not in the cache.
    """
    if os.path.isdir(name):
        yield
        return
    _require(name, where, revision, kind)
    try:
        yield
    except (Outage, UserError):
        raise
    except Exception as error:
        cause = None if is_offline_mode() else _network_cause(error)
        if cause is None:
            raise
        raise _outage(cause) from error


@cache
def _require(name: str, where: str, revision: str | None, kind: Kind) -> None:
    """Request a repository's description, once per process. If the hub does not respond, use the cache."""
    if is_offline_mode():
        if not _is_cached(name, revision, kind):
            raise _outages[0] if _outages else UserError([Problem(where, _not_cached(name, revision, kind))])
        return
    try:
        HfApi(endpoint=constants.ENDPOINT).repo_info(name, revision=revision, repo_type=kind, timeout=TIMEOUT_SECONDS)
    except HFValidationError:
        message = f"{name!r} is neither a directory that exists nor an id on the Hugging Face hub"
        raise UserError([Problem(where, message)]) from None
    except (httpx2.HTTPError, OSError) as error:
        if not _is_outage(error):
            raise UserError([Problem(where, _refusal(error, name, revision, kind))]) from error
        if not _is_cached(name, revision, kind):
            raise _outage(error, f", and {kind} {name} is not in the cache ({constants.HF_HUB_CACHE})") from error
        _use_cache_only(_outage(error))


def _not_cached(name: str, revision: str | None, kind: Kind) -> str:
    at = f" at revision {revision!r}" if revision else ""
    command = f"hf download {name}" + (" --repo-type dataset" if kind == "dataset" else "")
    return (
        f"{kind} {name}{at} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set, so it is not "
        f"downloaded: unset HF_HUB_OFFLINE, or fill the cache with `{command}` where the hub can be reached"
    )


def _is_cached(name: str, revision: str | None, kind: Kind) -> bool:
    if kind == "dataset" and _is_prepared(name):
        return True
    try:
        snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return False
    return True


def _is_prepared(dataset: str) -> bool:
    """Whether the `datasets` library has prepared tables of a hub dataset in its cache."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, dataset.replace("/", "___")).is_dir()


def _use_cache_only(outage: Outage) -> None:
    """Make this process and its children use only the cache, so that they do not wait for the hub."""
    _outages.append(outage)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it copies the setting when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _is_outage(error: Exception) -> bool:
    """Whether a retry may succeed: no response, too many requests, or a server error."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, (httpx2.HTTPError, ConnectionError, TimeoutError))


def _network_cause(error: BaseException) -> Exception | None:
    """Return the failed request that has caused an error, if it is an outage: the libraries chain exceptions."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, Exception) and not isinstance(link, OfflineModeIsEnabled) and _is_outage(link):
            return link
        link = link.__cause__ or link.__context__
    return None


def _outage(error: Exception, more: str = "") -> Outage:
    host = constants.ENDPOINT.removeprefix("https://")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return Outage(f"{host} can't be reached: {reason}{more}; with HF_HUB_OFFLINE=1 only the cache is used")


def _refusal(error: Exception, name: str, revision: str | None, kind: Kind) -> str:
    url = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if isinstance(error, GatedRepoError):
        return f"{kind} {name} is gated: accept its terms at {url}, then {_TOKEN}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 and "Invalid credentials" in str(error):
        return f"the hub does not accept the token: {_TOKEN}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:  # the hub's response without a login
        return f"the hub has no {kind} {name}, or it is private: check the name; for a private one {_TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{kind} {name} has no revision {revision!r}: expected a branch, a tag or a commit"
    if status == 403:
        return f"access to {kind} {name} is denied (HTTP {status}): {_TOKEN}"
    return f"{kind} {name} can't be read: {str(error).strip().splitlines()[0]}"
