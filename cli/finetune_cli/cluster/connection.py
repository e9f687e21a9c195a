"""Connection to a cluster: kubeconfig, context and namespace as for kubectl, and JSON requests."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.problems import did_you_mean
from finetune_cli.cluster.errors import ApiError, Unreachable
from finetune_trainer.errors import UserError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, Configuration

Json = dict[str, Any]
Query = dict[str, str]
EXTRA = "finetune-operator[operator]"
MERGE_PATCH = "application/merge-patch+json"
JSON = "application/json"
CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 60.0
_POOL = re.compile(r"^\w+\(host=[^)]*\): ")
"""Prefix of messages of urllib3: the address, which our messages already contain."""
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Target:
    """Cluster options of the command line. None: the value of the current context."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None

    def flags(self) -> str:
        """Return the command-line options, for a suggested next command."""
        given = {"-n": self.namespace, "--context": self.context, "--kubeconfig": self.kubeconfig}
        return "".join(f" {name} {value}" for name, value in given.items() if value is not None)


class Cluster:
    """One API server with the credentials of one user. `namespace` is the default namespace."""

    def __init__(self, api: ApiClient, namespace: str) -> None:
        self._api = api
        self.namespace = namespace
        self.server: str = api.configuration.host

    def get(self, path: str, query: Query | None = None) -> Json:
        return self.send("GET", path, query)

    def send(
        self, method: str, path: str, query: Query | None = None, body: Json | None = None, content_type: str = JSON
    ) -> Json:
        """Send a request and return the JSON response.

        Raises:
            ApiError: the response is an error.
            Unreachable: the API server does not respond.
        """
        with self._answer(method, path, query, body, content_type, ANSWER_SECONDS) as answer:
            text = answer.read()
        try:
            found: Json = json.loads(text)
        except ValueError as error:
            raise Unreachable(f"the response of {self.server}{path} is not JSON") from error
        return found

    def lines(self, path: str, query: Query, idle_seconds: float | None) -> Iterator[bytes]:
        """Yield the lines of a streamed response, without line ends.

        Args:
            idle_seconds: read timeout in seconds. None: no timeout.

        Raises:
            ApiError: the response is an error.
            Unreachable: no response, a lost connection or a read timeout.
        """
        with self._answer("GET", path, query, None, JSON, idle_seconds) as answer:
            rest = b""
            for piece in answer.stream(2**16):
                *whole, rest = (rest + piece).split(b"\n")
                yield from whole
            if rest:
                yield rest

    @contextmanager
    def _answer(
        self, method: str, path: str, query: Query | None, body: Json | None, content_type: str, seconds: float | None
    ) -> Iterator[Any]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": f"{JSON}, */*", "Content-Type": content_type}
        answer = None
        try:
            request = self._api.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = self._api.call_api(*request, _request_timeout=(CONNECT_SECONDS, seconds)).response
            if answer.status >= HTTPStatus.BAD_REQUEST:
                raise _refusal(answer.status, answer.read())
            yield answer
        except (HTTPError, ApiException, OSError) as error:
            raise Unreachable(_POOL.sub("", " ".join(str(error).split()))) from error
        finally:
            if answer is not None:
                answer.close()


def connect(target: Target) -> Cluster:
    """Connect to the cluster of a kubeconfig context, or to the cluster of this pod.

    Raises:
        UserError: the Kubernetes client is not installed, there is no kubeconfig, or the context does not exist.
    """
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise UserError(f"this command needs the Kubernetes client: pip install '{EXTRA}'") from error
    settings = client.Configuration()
    try:
        namespace = _configure(config, settings, target)
    except config.ConfigException as error:
        raise UserError(_no_context(config, target, str(error))) from error
    settings.retries = False  # callers decide what to retry
    settings.client_go_retries = True  # except reads that the API server asks to retry later (Retry-After)
    settings.keep_alive = True
    api = client.ApiClient(settings)
    api.user_agent = "finetune"
    return Cluster(api, target.namespace or namespace)


def _configure(config: Any, settings: Configuration, target: Target) -> str:
    """Set up the client's configuration and return the namespace of the context."""
    file = target.kubeconfig or os.environ.get("KUBECONFIG") or None
    if target.kubeconfig and not Path(target.kubeconfig).exists():
        raise UserError(f"--kubeconfig: no such file: {target.kubeconfig}")
    inside = "KUBERNETES_SERVICE_HOST" in os.environ and not Path("~/.kube/config").expanduser().exists()
    if file is None and target.context is None and inside:
        config.load_incluster_config(settings)
        return _POD_NAMESPACE.read_text().strip() if _POD_NAMESPACE.exists() else "default"
    contexts, current = config.list_kube_config_contexts(file)
    config.load_kube_config(file, target.context, settings)
    chosen = next((item for item in contexts if item["name"] == target.context), current)
    return chosen["context"].get("namespace") or "default"


def _no_context(config: Any, target: Target, message: str) -> str:
    where = target.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        names = [item["name"] for item in config.list_kube_config_contexts(where)[0]]
    except (config.ConfigException, KeyError, TypeError):
        names = []
    if target.context is not None and names and target.context not in names:
        return f"--context: no context {target.context!r} in {where}{did_you_mean(target.context, names)}"
    return f"no Kubernetes cluster is configured: {where}: {message}; set KUBECONFIG, --kubeconfig or --context"


def _refusal(code: int, body: bytes) -> ApiError:
    text = body.decode("utf-8", "replace")
    try:
        status = json.loads(text)
    except ValueError:
        status = {}
    if not isinstance(status, dict) or status.get("kind") != "Status":
        return ApiError(code, HTTPStatus(code).phrase if code in list(HTTPStatus) else "", text.strip()[:500], {})
    return ApiError(code, status.get("reason", ""), status.get("message", ""), status.get("details") or {})
