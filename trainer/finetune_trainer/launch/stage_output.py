"""Writes the output of a stage to storage: result, data report, metrics and `done.json`."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_trainer.layout import METRICS
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.fencing import AttemptFence
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import StageContext

LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class StageOutput:
    """The output of one stage. Only rank 0 writes it.

    Args:
        scratch: local directory of the stage.
    """

    context: StageContext
    storage: Storage
    store: CheckpointStore
    scratch: Path

    @property
    def result(self) -> Path:
        """Local directory of the result: the final one, or one in scratch for a remote storage."""
        return self.storage.local(self.context.layout.result) or self.scratch / "result"

    @property
    def metrics(self) -> Path:
        """Local path of the metrics file."""
        return self.storage.local(self.context.layout.metrics) or self.scratch / METRICS

    def fetch_metrics(self) -> None:
        """Download the metrics of earlier attempts, which may have run in another pod."""
        if not self.storage.is_local and self.storage.exists(self.context.layout.metrics):
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            self.metrics.write_bytes(self.storage.read_bytes(self.context.layout.metrics))

    def publish(self) -> None:
        """Upload the result, the data report and the metrics."""
        self.write_data_report()
        if not self.storage.is_local:
            self.storage.upload(self.result, self.context.layout.result)
            if self.metrics.exists():
                self.store.push_metrics(self.metrics)

    def write_data_report(self) -> None:
        """Write the report of the stage's data."""
        report = json.dumps(self.context.data.report.to_json(), indent=1)
        self.storage.write_text(self.context.layout.data_report, report)

    def write_done(self, steps: int, seconds: float, tokens: int, metrics: dict[str, float], **extra: Any) -> None:
        """Write `done.json`, which marks the stage as done.

        Args:
            steps: optimizer steps of the stage.
            seconds: seconds of training.
            tokens: tokens trained on.
            metrics: final metrics.
            extra: further keys; those with empty values are left out.

        Raises:
            Interrupted: a later attempt has begun.
        """
        AttemptFence(self.storage, self.context.run.attempt).check()
        done = {
            "steps": steps,
            "seconds": seconds,
            "tokens": tokens,
            "metrics": metrics,
            "world_size": self.context.placement.world_size,
            "zero": self.context.zero,
            "memory": self.context.placement.usage().to_json(),
            "environment": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }
        done |= {name: value for name, value in extra.items() if value}
        self.storage.write_text(self.context.layout.done, json.dumps(done, indent=1))
