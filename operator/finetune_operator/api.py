"""The API server, as narrow as the operator needs it: raw JSON over kubernetes' own asynchronous client."""

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
"""Objects of a list that are asked for, and held, at a time."""
USER_AGENT = "finetune-operator"
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class Api:
    """Calls with the operator's own identity.

    Raises:
        ApiException: from every method, for an answer that is an error.
        OSError, TimeoutError, aiohttp.ClientError: where there is no answer.
    """

    def __init__(self, configuration: Configuration, connections: int = 32) -> None:
        configuration.connection_pool_maxsize = connections
        configuration.client_session_kwargs = {"trust_env": uses_proxy()}
        self._client = ApiClient(configuration)
        self._client.user_agent = USER_AGENT

    async def get(self, path: str) -> Json | None:
        """An object; None where there is none."""
        try:
            return await self._call("GET", path)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    async def has_kuberay(self) -> bool:
        """Whether the cluster has RayJobs."""
        return await self.get("/apis/ray.io/v1") is not None

    async def items(self, path: str, query: str = "") -> AsyncIterator[Json]:
        """The objects of a list, read in pages."""
        chosen, more = f"&{query}" if query else "", ""
        while True:
            page = await self.get(f"{path}?limit={PAGE}{chosen}{more}") or {}
            for item in page.get("items", []):
                yield item
            more = (page.get("metadata") or {}).get("continue", "")
            if not more:
                return
            more = f"&continue={more}"

    async def stream(self, path: str, seconds: float) -> AsyncIterator[Json]:
        """The events of a watch that the API server ends after `seconds`; bookmarks come at least every minute or so,
        so longer silence is a dead connection.

        Raises:
            TimeoutError: nothing came for too long.
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
        await self._client.close()

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
    """The API server of the pod that this runs in, or else of the current kubeconfig context."""
    found = Configuration()
    if _TOKEN.exists():
        config.load_incluster_config(client_configuration=found)
    else:
        await config.load_kube_config(client_configuration=found)
    return found


async def connect(connections: int = 32) -> Api:
    """A client with this process's own identity, and so many connections at most; 0 for any number."""
    return Api(await configuration(), connections)


def reason_of(error: ApiException) -> tuple[str, str]:
    """The machine's reason and the people's message in an error's body."""
    try:
        body = json.loads(error.body or "{}")
    except ValueError:
        body = {}
    return str(body.get("reason", "")), str(body.get("message") or error.reason)
