"""Run states corrected by the driver pods, which show the end of an attempt before the engine does (pure)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api.exit_codes import ExitCode
from finetune_operator.core.snapshot import ENDED, Observed, PodView, RunState, RunView
from finetune_operator.decide.classify import termination_report

DRIVER_END_SECONDS = 20
"""How long to wait for the driver pod of an ended run to end: its termination message has the reason."""


def settled(seen: Observed, now: datetime) -> tuple[Observed, datetime | None]:
    """Return the snapshot with each run's state corrected by its driver pod, and when to reconcile again.

    A run whose driver ended well has succeeded, however its other pods ended: the worker pods stop when the driver
    does, and where the driver's node does not answer, the API server shows their ends first. With an engine that
    keeps a run going without its driver (`ends_with_driver`), the run is over when the driver's pod has ended. A run
    that its engine reports as ended counts as running until the driver's pod has ended too, because that pod's
    termination message says more; with the other engines this holds for a success, which may be seen before its pod.
    """
    runs = tuple(_settled(run, seen.pods_of(run.run), now) if run.owner == seen.uid else run for run in seen.runs)
    waits = [due for run in seen.runs if (due := _due(seen, run)) is not None and due > now]
    return replace(seen, runs=runs), min(waits, default=None)


def _settled(run: RunView, pods: tuple[PodView, ...], now: datetime) -> RunView:
    drivers = [pod for pod in pods if pod.index == 0]
    if run.state is RunState.FAILED and any(pod.phase == "Succeeded" for pod in drivers):
        return replace(run, state=RunState.SUCCEEDED)
    if run.state in ENDED:
        due = _driver_deadline(run, drivers)
        return replace(run, state=RunState.RUNNING) if due is not None and due > now else run
    if not run.ends_with_driver or run.state is RunState.QUEUED:
        return run
    ended = [pod for pod in pods if (pod.ended if pod.index == 0 else _is_unfit_node(pod))]
    if not ended:
        return run
    well = all(pod.index == 0 and pod.exit_code == ExitCode.OK for pod in ended)
    return replace(run, state=RunState.SUCCEEDED if well else RunState.FAILED, orphaned=True)


def _is_unfit_node(pod: PodView) -> bool:
    """Whether a pod other than the driver ended because its node failed the checks of `finetune doctor`."""
    return pod.ended and termination_report(pod) is not None


def _due(seen: Observed, run: RunView) -> datetime | None:
    return _driver_deadline(run, [pod for pod in seen.pods_of(run.run) if pod.index == 0])


def _driver_deadline(run: RunView, drivers: list[PodView]) -> datetime | None:
    """Return until when to wait for the driver pod's end; None if there is nothing to wait for."""
    by_driver = run.ends_with_driver and run.state in ENDED
    waited_for = (by_driver or run.state is RunState.SUCCEEDED) and run.ended is not None
    if not waited_for or not drivers or drivers[0].ended or run.ended is None:
        return None
    return run.ended + timedelta(seconds=DRIVER_END_SECONDS)
