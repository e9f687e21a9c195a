"""Which engines the operator can use: those that its settings allow and whose kind the cluster serves."""

from __future__ import annotations

from finetune_operator.api import Api
from finetune_operator.core.settings import Settings
from finetune_operator.engines import Engine
from finetune_operator.engines.registry import allowed_engines


async def is_served(api: Api, engine: Engine) -> bool:
    """Whether the cluster serves the engine's kind."""
    return await api.serves(engine.api_path, engine.plural)


async def available_engines(api: Api, settings: Settings) -> list[Engine]:
    """Return the engines that jobs can use in this cluster."""
    return [engine for engine in allowed_engines(settings) if await is_served(api, engine)]
