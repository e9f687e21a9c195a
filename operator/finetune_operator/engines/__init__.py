"""The engines that can run an attempt. A new engine is a module in this folder and a line in this list."""

from __future__ import annotations

from finetune_operator.engines import indexed_job, kuberay
from finetune_operator.engines.engine import Engine

REGISTERED = [
    indexed_job.ENGINE,
    kuberay.ENGINE,
]
ENGINES: dict[str, Engine] = {engine.name: engine for engine in REGISTERED}

__all__ = ["ENGINES", "Engine"]
