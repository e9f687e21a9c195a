"""The calls to the API server that the operator needs, as raw JSON over the asynchronous client of kubernetes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiException, Configuration
from kubernetes.aio.client.api_client import ApiClient

Json = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"
TIMEOUT_SECONDS = 30
SILENCE_SECONDS = 90
PAGE = 250
"""Number of objects in one page of a list."""
USER_AGENT = "finetune-operator"
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Api:
    """A client with the identity of the operator.

    Raises:
        ApiException: from every method, for an error that the API server returns.
        OSError, TimeoutError, aiohttp.ClientError: from every method, where the API server does not answer.
    """

    def __init__(self, configuration: Configuration, connections: int = 32) -> None:
        configuration.connection_pool_maxsize = connections
        configuration.client_session_kwargs = {"trust_env": uses_proxy()}
        self._client = ApiClient(configuration)
        self._client.user_agent = USER_AGENT

    async def get(self, path: str) -> Json | None:
        """Return an object; None where it does not exist."""
        try:
            return await self._call("GET", path)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    async def serves(self, path: str, plural: str) -> bool:
        """Whether the cluster serves a resource of the API group and version at `path`."""
        found = await self.get(path) or {}
        return any(resource["name"] == plural for resource in found.get("resources") or [])

    async def items(self, path: str, query: str = "") -> AsyncIterator[Json]:
        """Yield the objects of a list, which is read in pages."""
        selection, more = f"&{query}" if query else "", ""
        while True:
            page = await self.get(f"{path}?limit={PAGE}{selection}{more}") or {}
            for item in page.get("items", []):
                yield item
            more = (page.get("metadata") or {}).get("continue", "")
            if not more:
                return
            more = f"&continue={more}"

    async def stream(self, path: str, seconds: float) -> AsyncIterator[Json]:
        """Yield the events of a watch that the API server ends after `seconds`.

        The API server sends a bookmark about every minute, so a longer silence means that the connection is dead.

        Raises:
            TimeoutError: no event arrived for `SILENCE_SECONDS`.
        """
        timeout = aiohttp.ClientTimeout(total=seconds + TIMEOUT_SECONDS, sock_connect=10, sock_read=SILENCE_SECONDS)
        response = await self._send("GET", path, None, "application/json", timeout)
        async with response.response:
            if response.status != 200:
                await response.read()
                raise ApiException(http_resp=response)
            rest = b""
            async for piece in response.response.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield json.loads(line)

    async def create(self, path: str, body: Json) -> Json:
        return await self._call("POST", path, body)

    async def merge(self, path: str, body: Json) -> Json:
        return await self._call("PATCH", path, body, MERGE_PATCH)

    async def delete(self, path: str, body: Json) -> Json:
        return await self._call("DELETE", path, body)

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]  # generated code without types

    async def _call(self, method: str, path: str, body: Json | None = None, content: str = "application/json") -> Json:
        response = await self._send(method, path, body, content, TIMEOUT_SECONDS)
        await response.read()
        if not 200 <= response.status <= 299:
            raise ApiException(http_resp=response)
        answer: Json = json.loads(response.data)
        return answer

    async def _send(self, method: str, path: str, body: Json | None, content: str, timeout: Any) -> Any:
        headers: dict[str, str] = {
            "Accept": "application/json",
            "Content-Type": content,
            "User-Agent": self._client.user_agent,
        }
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = f"{self._client.configuration.host}{path}"
        return await self._client.call_api(method, url, headers, body, _request_timeout=timeout)


def uses_proxy() -> bool:
    """Whether the environment sets a proxy. Without one aiohttp need not look up proxies and netrc for every call."""
    return bool(getproxies().keys() - {"no"})


async def configuration() -> Configuration:
    """Return the configuration of the pod that this process runs in, or else of the current kubeconfig context."""
    found = Configuration()
    if _TOKEN.exists():
        config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
    else:
        await config.load_kube_config(client_configuration=found)  # type: ignore[no-untyped-call]
    return found


async def connect(connections: int = 32) -> Api:
    """Return a client with the identity of this process.

    Args:
        connections: the largest number of connections; 0 is no limit.
    """
    return Api(await configuration(), connections)


def reason_of(error: ApiException) -> tuple[str, str]:
    """Return the reason (for programs) and the message (for people) in the body of an error."""
    try:
        body = json.loads(error.body or "{}")
    except ValueError:
        body = {}
    return str(body.get("reason", "")), str(body.get("message") or error.reason)
