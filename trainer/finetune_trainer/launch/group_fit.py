"""One worker group from the driver's side: start the workers, listen, and say how it ended."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.cluster import Workers
from finetune_trainer.launch.failures import Failure, classify, place_of
from finetune_trainer.launch.placement import Placement
from finetune_trainer.launch.slots import asked
from finetune_trainer.launch.stall_watch import BEGIN_SECONDS, Stall, StallWatch
from finetune_trainer.launch.worker import train_loop
from finetune_trainer.progress.beats import Beat
from finetune_trainer.progress.channel import Event, Placing, open_channel
from finetune_trainer.training.offer import Offer
from finetune_trainer.training.work import StageWork, WorkOrder

LISTEN_SECONDS = 0.2
END_SECONDS = 60.0
"""How long Ray may take to notice that stalled workers were ended, before the driver goes on without it."""


class GroupFit:
    """Attempts at a job's remaining stages.

    Args:
        hear: called with what the workers say, in order.
        stop: once it is set, the workers are asked to save a checkpoint and stop.
        stalls: what to do where the workers make no progress.
        offer: what the workers' nodes fetch first.
        watched: makes a context in which this process should never take long (`DriverWatch.listening`).
    """

    def __init__(
        self,
        run: RunConfig,
        workers: Workers,
        hear: Callable[[Event], None],
        stop: threading.Event,
        stalls: Callable[[Stall], Failure],
        offer: Offer | None = None,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.run, self.workers, self.hear, self.stop, self.stalls = run, workers, hear, stop, stalls
        self.offer, self.watched = offer or Offer(), watched

    def attempt(self, stages: list[StageWork]) -> Failure | None:
        """Train until the stages are done (None) or the workers fail.

        Raises:
            Exception: what Ray Train raises before there are workers.
        """
        channel = open_channel()
        outcome: list[Failure | BaseException] = []
        thread = threading.Thread(target=self._fit, args=(stages, channel, outcome), daemon=True)
        thread.start()
        try:
            stalled = self._listen(channel, thread)
        finally:
            ray.kill(channel)
        if stalled is not None:
            return stalled
        if outcome and not isinstance(outcome[0], Failure):
            raise outcome[0]
        return outcome[0] if outcome else None  # type: ignore[return-value]

    def _fit(self, stages: list[StageWork], channel: Any, outcome: list[Failure | BaseException]) -> None:
        try:
            self._trainer(stages, channel).fit()
        except (TrainingFailedError, OutOfMemoryError) as error:  # the latter where Ray has killed its controller
            outcome.append(classify(error))
        except BaseException as error:
            outcome.append(error)

    def _trainer(self, stages: list[StageWork], channel: Any) -> TorchTrainer:
        run = self.run.model_dump_json(by_alias=True, exclude_none=True)
        order = WorkOrder(run, stages, self.workers.accelerator, self.workers.cpus, channel, self.offer)
        scratch = Path(self.run.cache_dir, "ray", self.run.job.metadata.name)
        shutil.rmtree(scratch, ignore_errors=True)
        return _Trainer(
            train_loop,
            train_loop_config={"order": order},
            scaling_config=_scaling(self.workers),
            torch_config=TorchConfig(
                backend="nccl" if self.workers.accelerator else "gloo",
                timeout_s=self.run.job.spec.run_policy.ddp_timeout,
            ),
            # Retries are ours: Ray's don't tell a lost worker from a wrong job.
            run_config=RayRunConfig(storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)),
        )

    def _listen(self, channel: Any, thread: threading.Thread) -> Failure | None:
        """Pass on what the workers say, and once the wish to stop, until the workers are gone; watch their pulses.

        Returns the failure of workers that stalled.
        """
        passed_on, watch = False, StallWatch(self.run.job.spec.run_policy.stall_timeout, self.workers.most)
        placement = Placement(lambda text: self.hear(Placing(text)))
        ray.get(channel.beats.remote(), timeout=BEGIN_SECONDS)  # the channel's process has to start first
        while thread.is_alive():
            thread.join(LISTEN_SECONDS)
            with self.watched():
                beats = self._pass_on(channel, placement)
            if thread.is_alive() and (stall := watch.look(time.monotonic(), beats, placement.queued)):
                failure = self.stalls(stall)
                thread.join(END_SECONDS)
                return failure
            if self.stop.is_set() and not passed_on:
                channel.stop.remote()
                passed_on = True
        for event in ray.get(channel.collect.remote()):
            self.hear(event)
        return None

    def _pass_on(self, channel: Any, placement: Placement) -> dict[int, Beat]:
        """Return the workers' pulses, after what they say was passed on."""
        placement.look()
        for event in ray.get(channel.collect.remote()):
            placement.begun()
            self.hear(event)
        found: dict[int, Beat] = ray.get(channel.beats.remote())
        return found


class _Trainer(TorchTrainer):
    """Ray Train's, without what watches over placement groups and over Ray's datasets.

    A job has no such datasets. A placement group goes with the controller that made it; its watcher asks Ray's
    dashboard, which a job has not, and keeps a group of workers that ends in its first 40 seconds waiting for 12.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]


def _scaling(workers: Workers) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(workers.least, workers.most) if workers.elastic else workers.most,
        use_gpu=workers.accelerator,
        resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.accelerator else {}), **asked()},
    )


def keep_trying(
    attempt: Callable[[], Failure | None],
    progressed: Callable[[], bool],
    wait: Callable[[float], bool],
    limit: int,
    restarting: Callable[[str], None],
    missing: Callable[[], str],
) -> Failure | None:
    """Attempt until done, until a failure that no retry mends, or until `limit` retries without progress.

    The same error at the same step in two attempts in a row is one that no retry mends.

    Args:
        restarting: is told why another attempt begins.
        missing: what stands in the way of another attempt and won't go away; empty where nothing does.
        progressed: whether a checkpoint or a stage was completed since it was last asked; sets the count back.
        wait: waits so many seconds; true where it was asked to stop meanwhile.
    """
    retries, before = 0, None
    while True:
        failure = attempt()
        if failure is None or not failure.retryable:
            return failure
        if failure.signature is not None and failure.signature == before:
            return replace(failure, text=f"{failure.text.rstrip()}\n{_again(failure)}")
        before = failure.signature
        retries = 0 if progressed() else retries + failure.counts
        if retries > limit:
            return failure
        restarting(f"{failure.kind.value}: {failure.line}")
        if wait(min(2.0 ** (retries - 1), 60.0) if retries else 0.0):
            return failure
        if obstacle := missing():
            return replace(failure, text=f"{failure.text}\n{obstacle}")


def _again(failure: Failure) -> str:
    place = place_of(failure.error)
    where = "" if place is None else f" after step {place[1]} of stage {place[0] + 1}"
    return f"{failure.line} (the same error twice in a row{where}: not tried again)"
