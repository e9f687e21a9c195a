"""What can run an attempt: a new engine is a module here with the three functions of `Engine`, and a line below."""

from __future__ import annotations

from finetune_operator.core.settings import Settings, engine_name
from finetune_operator.engines import indexed_job, kuberay
from finetune_operator.engines.engine import Engine

ENGINES: dict[str, Engine] = {"job": indexed_job.ENGINE, "kuberay": kuberay.ENGINE}


def engine_of(wanted: str, settings: Settings) -> Engine:
    """The engine that a job names, or the operator's default."""
    return ENGINES[engine_name(wanted, settings)]


__all__ = ["ENGINES", "Engine", "engine_of"]
