"""The key that the tokens of runs are derived from: a Secret in the operator's namespace."""

from __future__ import annotations

import base64
import dataclasses
import secrets

from kubernetes.aio.client import ApiException

from finetune_operator.api import Api, Json
from finetune_operator.core.settings import Settings

KEY = "key"


async def with_token_key(api: Api, settings: Settings) -> Settings:
    """Return the settings with the token key; create the Secret if it does not exist.

    An existing key is never replaced: the tokens of running jobs are derived from it.

    Raises:
        ApiException: The operator may not read or create the Secret.
        ValueError: The Secret has no key.
    """
    if settings.token_key:
        return settings
    path = f"/api/v1/namespaces/{settings.operator_namespace}/secrets"
    found = await api.get(f"{path}/{settings.token_key_secret}") or await _create(api, path, settings)
    text = (found.get("data") or {}).get(KEY)
    if not text:
        raise ValueError(f"Secret {settings.token_key_secret} has no {KEY!r}: delete it to get a new one")
    return dataclasses.replace(settings, token_key=base64.b64decode(text))


async def _create(api: Api, path: str, settings: Settings) -> Json:
    value = base64.b64encode(secrets.token_bytes(32)).decode()
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": settings.token_key_secret, "namespace": settings.operator_namespace},
        "immutable": True,
        "data": {KEY: value},
    }
    try:
        return await api.create(path, body)
    except ApiException as error:
        if error.status != 409:
            raise
        return await api.get(f"{path}/{settings.token_key_secret}") or {}
