"""Runs a Ray Train worker group from the driver: starts it, receives its events, and classifies its failure."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
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
from finetune_trainer.launch.failures import Failure, classify, step_of
from finetune_trainer.launch.placement import PlacementWatch
from finetune_trainer.launch.sharing.records import Offer
from finetune_trainer.launch.stall_watch import Stall, StallWatch
from finetune_trainer.launch.work_order import WorkOrder
from finetune_trainer.launch.worker import train_loop
from finetune_trainer.plan.worker_slots import asked
from finetune_trainer.plan.workers import Workers
from finetune_trainer.progress.channel import Event, Placing, open_channel
from finetune_trainer.training.stage_work import StageWork

POLL_SECONDS = 0.2
END_SECONDS = 60.0
"""How long the driver waits for Ray to notice that stalled workers were killed."""


class WorkerGroup:
    """The worker groups that run a job's remaining stages, one group per attempt.

    Args:
        on_event: receives the workers' events, in order.
        stop: once it is set, the workers are asked to save a checkpoint and stop.
        on_stall: ends workers that make no progress and returns the failure.
        offer: directories that the workers' nodes fetch first.
    """

    def __init__(
        self,
        run: RunConfig,
        workers: Workers,
        on_event: Callable[[Event], None],
        stop: threading.Event,
        on_stall: Callable[[Stall], Failure],
        offer: Offer | None = None,
    ) -> None:
        self.run, self.workers, self.stop = run, workers, stop
        self.on_event, self.on_stall = on_event, on_stall
        self.offer = offer or Offer()

    def attempt(self, stages: list[StageWork]) -> Failure | None:
        """Start a worker group and run the stages. Return the failure, or None once all stages are done.

        Raises:
            Exception: any error of Ray Train before the workers start.
        """
        channel = open_channel()
        outcome: list[Failure | BaseException] = []
        thread = threading.Thread(target=self._fit, args=(stages, channel, outcome), daemon=True)
        thread.start()
        try:
            stalled = self._follow(channel, thread)
        finally:
            ray.kill(channel)
        if stalled is not None:
            return stalled
        result = outcome[0] if outcome else None
        if isinstance(result, BaseException):
            raise result
        return result

    def _fit(self, stages: list[StageWork], channel: Any, outcome: list[Failure | BaseException]) -> None:
        try:
            self._trainer(stages, channel).fit()
        except (TrainingFailedError, OutOfMemoryError) as error:  # the latter if Ray has killed its controller
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
            # The driver retries by itself, because Ray's retries do not distinguish a lost worker from a wrong job.
            run_config=RayRunConfig(storage_path=str(scratch), failure_config=FailureConfig(max_failures=0)),
        )

    def _follow(self, channel: Any, thread: threading.Thread) -> Failure | None:
        """Forward events and the stop request and watch heartbeats until the workers end.

        Returns:
            the failure of workers that stalled, or None.
        """
        stop_sent, watch = False, StallWatch(self.run.job.spec.run_policy.stall_timeout)
        placement = PlacementWatch(lambda text: self.on_event(Placing(text)))
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            placement.poll()
            if thread.is_alive() and (stall := watch.look(time.monotonic(), ray.get(channel.heartbeats.remote()))):
                failure = self.on_stall(stall)
                thread.join(END_SECONDS)
                return failure
            if self.stop.is_set() and not stop_sent:
                channel.request_stop.remote()
                stop_sent = True
            for event in ray.get(channel.collect.remote()):
                placement.workers_started()
                self.on_event(event)
        for event in ray.get(channel.collect.remote()):
            self.on_event(event)
        return None


class _Trainer(TorchTrainer):
    """Ray Train's trainer without its callbacks for placement groups and for Ray datasets.

    A job uses no Ray datasets. Ray removes a placement group together with the controller that has created it; the
    cleaner calls Ray's dashboard, which a job does not run, and delays a worker group that ends within its first 40
    seconds by 12 seconds.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()  # type: ignore[misc]  # of Train v2
        return [callback for callback in callbacks if not isinstance(callback, unused)]


def _scaling(workers: Workers) -> ScalingConfig:
    elastic: Any = (workers.least, workers.most)  # Train v2 takes a range; the type of the field is that of v1
    return ScalingConfig(
        num_workers=elastic if workers.elastic else workers.most,
        use_gpu=workers.accelerator,
        resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.accelerator else {}), **asked()},
    )


def retry_attempts(
    attempt: Callable[[], Failure | None],
    progressed: Callable[[], bool],
    wait: Callable[[float], bool],
    limit: int,
    restarting: Callable[[str], None],
    missing: Callable[[], str],
) -> Failure | None:
    """Call `attempt` until it succeeds, fails finally, or has been retried `limit` times without progress.

    The same error at the same step in two consecutive attempts is final.

    Args:
        attempt: runs one attempt and returns its failure, or None.
        progressed: whether a checkpoint or a stage was completed since the last call; resets the count of retries.
        wait: waits for a number of seconds; returns True if the driver was asked to stop meanwhile.
        limit: `runPolicy.backoffLimit`.
        restarting: receives the reason of each retry.
        missing: waits for the nodes of the job; returns an error message if some stay missing.
    """
    retries, before = 0, None
    while True:
        failure = attempt()
        if failure is None or not failure.retryable:
            return failure
        if failure.signature is not None and failure.signature == before:
            return replace(failure, text=f"{failure.text.rstrip()}\n{_repeated(failure)}")
        before = failure.signature
        retries = 0 if progressed() else retries + failure.counts
        if retries > limit:
            return failure
        restarting(f"{failure.kind.value}: {failure.line}")
        if wait(min(2.0 ** (retries - 1), 60.0) if retries else 0.0):
            return failure
        if problem := missing():
            return replace(failure, text=f"{failure.text}\n{problem}")


def _repeated(failure: Failure) -> str:
    step = step_of(failure.error)
    where = "" if step is None else f" after step {step[1]} of stage {step[0] + 1}"
    return f"{failure.line} (the same error twice in a row{where}: not retried)"


class HasGrown:
    """Whether a value has grown since the last call."""

    def __init__(self, current: Callable[[], tuple[int, int]]) -> None:
        self.current = current
        self.last = current()

    def __call__(self) -> bool:
        before, self.last = self.last, self.current()
        return self.last > before
