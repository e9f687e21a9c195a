"""Access to an API server as a user (client, kubeconfig, kubectl), and test namespaces."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kubernetes import client, watch

Json = dict[str, Any]


@dataclass(frozen=True)
class Access:
    """An API server's address, its CA, and a bearer token."""

    url: str
    ca_file: Path
    token: str = field(repr=False)
    kubectl_path: Path

    def at(self, url: str) -> Access:
        """Return the same credentials for another address, such as a proxy's."""
        return replace(self, url=url)

    def client(self, user_agent: str = "") -> client.ApiClient:
        """Return a client of the official library; close it, or use it as a context manager."""
        configuration = client.Configuration()
        configuration.host = self.url
        configuration.ssl_ca_cert = str(self.ca_file)
        configuration.api_key = {"authorization": f"Bearer {self.token}"}
        made = client.ApiClient(configuration)
        if user_agent:
            made.user_agent = user_agent
        return made

    def kubeconfig(self, path: Path, namespace: str = "default") -> Path:
        """Write a kubeconfig (JSON, which is YAML) that only its owner can read, and return its path."""
        cluster = {"server": self.url, "certificate-authority": str(self.ca_file)}
        context = {"cluster": "test", "user": "test", "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": context}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(content))
        return path

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl as this user.

        Raises:
            AssertionError: it failed and `check` is set; the message is its output.
        """
        options = [f"--server={self.url}", f"--certificate-authority={self.ca_file}", f"--token={self.token}"]
        command = [str(self.kubectl_path), "--kubeconfig=/dev/null", *options, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done

    def apply(self, *manifests: Json, namespace: str = "default") -> None:
        """Apply manifests on the server side; a namespace in a manifest overrides `namespace`."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        options = ["--server-side", "--force-conflicts", f"--namespace={namespace}"]
        self.kubectl("apply", *options, "--filename=-", stdin=json.dumps(items))

    def define(self, *definitions: Json) -> None:
        """Apply CRDs and wait until the API server serves their kinds."""
        self.apply(*definitions)
        with self.client() as api:
            listing = client.ApiextensionsV1Api(api).list_custom_resource_definition
            for definition in definitions:
                until(listing, _established, field_selector=f"metadata.name={definition['metadata']['name']}")

    def service_account(self, namespace: str, name: str, *, seconds: int = 3600) -> Access:
        """Return the access of a pod with this service account, with a new token (TokenRequest)."""
        spec = client.V1TokenRequestSpec(audiences=[], expiration_seconds=seconds)
        request = client.AuthenticationV1TokenRequest(spec=spec)
        with self.client() as api:
            answer = client.CoreV1Api(api).create_namespaced_service_account_token(name, namespace, request)
        return replace(self, token=answer.status.token)


def _established(definition: client.V1CustomResourceDefinition) -> bool:
    conditions = (definition.status and definition.status.conditions) or []
    return any(condition.type == "Established" and condition.status == "True" for condition in conditions)


@contextmanager
def namespace_of(access: Access, prefix: str, labels: dict[str, str] | None = None) -> Iterator[str]:
    """Create a namespace with its default service account; delete it at the end without waiting.

    Its pods are deleted at once, because they would block the deletion forever on a node without a kubelet.
    """
    name = f"{prefix[:40].strip('-')}-{uuid.uuid4().hex[:8]}"
    with access.client() as api:
        core = client.CoreV1Api(api)
        core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name, labels=labels)))
        accounts = core.list_namespaced_service_account
        # The controllers may take long to recover after an outage of the API server.
        until(accounts, lambda found: found.metadata.name == "default", timeout=120, namespace=name)
        try:
            yield name
        finally:
            core.delete_namespace(name)
            core.delete_collection_namespaced_pod(name, grace_period_seconds=0)


def until(listing: Callable[..., Any], wanted: Callable[[Any], bool], *, timeout: float = 30, **query: Any) -> Any:
    """Watch the objects of `listing(**query)` until `wanted` accepts one, and return it.

    `listing` is a list method of the official client.

    Raises:
        AssertionError: none came within `timeout` seconds; the message has the last object's name and status.
    """
    last = None
    for event in watch.Watch().stream(listing, timeout_seconds=max(1, int(timeout)), **query):
        last = event["object"]
        if event["type"] != "DELETED" and wanted(last):
            return last
    raise AssertionError(f"not within {timeout} s; last seen: {_in_short(last)}")


def _in_short(item: Any) -> str:
    """Return name and status as JSON, so that a test's failure message is short."""
    whole = client.ApiClient().sanitize_for_serialization(item) or {}
    return json.dumps({"name": whole.get("metadata", {}).get("name"), "status": whole.get("status")})


def until_gone(listing: Callable[..., Any], name: str, *, timeout: float = 30, **query: Any) -> None:
    """Watch `listing(**query)` until it has no object of that name.

    Raises:
        AssertionError: it still exists after `timeout` seconds.
    """
    found = client.ApiClient().sanitize_for_serialization(listing(**query))
    if all(item["metadata"]["name"] != name for item in found["items"]):
        return
    query |= {"resource_version": found["metadata"]["resourceVersion"], "timeout_seconds": max(1, int(timeout))}
    for event in watch.Watch().stream(listing, **query):
        if event["type"] == "DELETED" and event["raw_object"]["metadata"]["name"] == name:
            return
    raise AssertionError(f"{name} is still there after {timeout} s")
