"""One trained stage from the driver's side: start the workers, listen, try again, or say why not."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.channel import open_channel
from finetune_trainer.launch.cluster import Workers
from finetune_trainer.launch.failures import Failure, classify
from finetune_trainer.launch.worker import train_loop
from finetune_trainer.progress.reporter import Reporter

LISTEN_SECONDS = 0.2


@dataclass(frozen=True)
class StageFit:
    """One attempt at one stage."""

    run: RunConfig
    index: int
    zero: int
    workers: Workers
    reporter: Reporter
    stop: threading.Event

    def run_once(self) -> Failure | None:
        """Train until the stage ends; None where it is done."""
        channel = open_channel()
        outcome: list[Failure | BaseException] = []
        thread = threading.Thread(target=self._fit, args=(channel, outcome), daemon=True)
        thread.start()
        try:
            self._listen(channel, thread)
        finally:
            ray.kill(channel)
        if outcome and not isinstance(outcome[0], Failure):
            raise outcome[0]
        return outcome[0] if outcome else None  # type: ignore[return-value]

    def _fit(self, channel: Any, outcome: list[Failure | BaseException]) -> None:
        try:
            self._trainer(channel).fit()
        except TrainingFailedError as error:
            outcome.append(classify(error))
        except BaseException as error:
            outcome.append(error)

    def _trainer(self, channel: Any) -> TorchTrainer:
        scratch = Path(self.run.cache_dir, "ray", self.run.job.metadata.name)
        shutil.rmtree(scratch, ignore_errors=True)
        return TorchTrainer(
            train_loop,
            train_loop_config={
                "run": self.run.model_dump_json(by_alias=True, exclude_none=True),
                "stage": self.index,
                "zero": self.zero,
                "threads": self.workers.cpus,
                "accelerator": self.workers.accelerator,
                "channel": channel,
            },
            scaling_config=_scaling(self.workers),
            torch_config=TorchConfig(backend="nccl" if self.workers.accelerator else "gloo"),
            run_config=RayRunConfig(
                name=f"stage-{self.index}", storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)
            ),
        )

    def _listen(self, channel: Any, thread: threading.Thread) -> None:
        """Pass on what the workers say, and once the wish to stop, until the workers are gone."""
        passed_on = False
        while thread.is_alive():
            thread.join(LISTEN_SECONDS)
            if self.stop.is_set() and not passed_on:
                channel.stop.remote()
                passed_on = True
            self._deliver(channel)
        self._deliver(channel)

    def _deliver(self, channel: Any) -> None:
        mail = ray.get(channel.collect.remote())
        for line in mail.lines:
            self.reporter.log(line)
        if mail.progress is not None:
            self.reporter.progress(mail.progress)


def _scaling(workers: Workers) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(workers.least, workers.most) if workers.elastic else workers.most,
        use_gpu=workers.accelerator,
        resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.accelerator else {})},
    )


def keep_trying(
    attempt: Callable[[], Failure | None],
    progressed: Callable[[], bool],
    wait: Callable[[float], bool],
    limit: int,
    log: Callable[[str], None],
) -> Failure | None:
    """Attempt until done, until a failure that no retry mends, or until `limit` retries without progress.

    Args:
        progressed: whether a checkpoint was completed since it was last asked; that sets the count back.
        wait: waits so many seconds; true where it was asked to stop meanwhile.
    """
    retries = 0
    while True:
        failure = attempt()
        if failure is None or not failure.retryable:
            return failure
        retries = 0 if progressed() else retries + 1
        if retries > limit:
            return failure
        log(f"{failure.kind.value}: {_last_line(failure.text)}; starting again from the last checkpoint")
        if wait(min(2.0 ** max(0, retries - 1), 60.0) if retries else 0.0):
            return failure


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
