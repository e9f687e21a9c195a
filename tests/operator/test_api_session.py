"""The HTTP session of the API client."""

from __future__ import annotations

import asyncio

import pytest
from kubernetes.aio.client import Configuration

from finetune_operator.api import Api


@pytest.mark.parametrize(
    ("environment", "looks_up"),
    [({}, False), ({"no_proxy": "10.0.0.0/8"}, False), ({"https_proxy": "http://proxy:3128"}, True)],
)
def test_proxies_and_netrc_are_looked_up_only_where_a_proxy_is_set(
    environment: dict[str, str], looks_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    async def trusts_environment() -> bool:
        api = Api(Configuration())
        session = api._client.rest_client._create_pool_manager()
        try:
            return bool(session.trust_env)
        finally:
            await session.close()
            await api.close()

    assert asyncio.run(trusts_environment()) is looks_up
