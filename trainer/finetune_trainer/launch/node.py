"""Runs a pod of an attempt, on either engine: the head pod starts the Ray head and the driver, the others join it.

The driver is a process of its own, which this process watches (`driver_process`). In jobs without GPUs another process
imports the libraries while Ray starts. The driver and Ray's workers are forked from it (`forks`), so that they need not
import the libraries again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_api.report import PORT, STOP_PATH
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.driver_exit import TerminationSignal, write_exit_code
from finetune_trainer.launch.driver_process import StoppedWatch, run_watched
from finetune_trainer.launch.fork_imports import forks
from finetune_trainer.launch.node_role import NodeRole, node_role
from finetune_trainer.plan.threads import threads_per_worker
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.runtime import apply_environment, quiet_environment

HEAD_SECONDS = 1800.0
"""How long a node waits for the head pod, which may still be pulling its image."""
RETRY_SECONDS = 0.5
JOIN_ATTEMPTS, JOIN_SECONDS = 5, 180.0
"""Number of starts of Ray, if it ends within this time although the head accepts connections."""
LOST_SECONDS = 5.0
"""A driver that has been unreachable for this time counts as ended."""
SIGTERM_EXIT = 128 + signal.SIGTERM
_RAY = [sys.executable, "-m", "finetune_trainer.forks.start"]
_DRIVE = Path(__file__).with_name("driver_program.py")


def run_node(config: Path) -> int:
    """Run this pod and return its exit code. The code of pod 0 is that of the attempt (`ExitCode`)."""
    # The first process of a container ignores every signal for which it has no handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_EXIT))
    run = RunConfig.model_validate_json(config.read_text())
    resources = run.job.spec.resources
    apply_environment(quiet_environment(accelerator=bool(resources.gpus_per_node)))
    # Nodes whose head is lost end soon, so that their pods make room for those of the next attempt.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_worker(resources)))
    place = node_role(resources)
    with forks(run, print):
        return _head(run, config, place) if place.head else _worker(run, place)


def _head(run: RunConfig, config: Path, place: NodeRole) -> int:
    """Start the Ray head and run the driver. With KubeRay, then wait until the cluster is deleted (`driver_exit`)."""
    farewell = TerminationSignal() if place.watched else None
    subprocess.run([*_RAY, "start", *place.options], check=True, stdout=subprocess.DEVNULL, env=_environment(place))
    os.environ["RAY_ADDRESS"] = place.address
    code = _drive(run, config)
    if farewell is not None:
        write_exit_code(code)
        farewell.wait()
    return code


def _drive(run: RunConfig, config: Path) -> int:
    """Return the driver's exit code. If the driver stayed stopped by a signal, write its report in its place."""
    watch = StoppedWatch(run.job.spec.run_policy.stall_timeout)
    code = run_watched([str(_DRIVE), str(config)], watch)
    if not watch.found:
        return code
    from finetune_trainer.launch.drive import report_hung_driver

    return int(report_hung_driver(AttemptReporter([]), watch.found))


def _environment(place: NodeRole) -> dict[str, str]:
    return {**os.environ, **place.environment}


def _worker(run: RunConfig, place: NodeRole) -> int:
    """Join the Ray cluster and stay until the head ends.

    Returns FAILED if the head never starts or ends; the Job then ends, and this pod with it. A node that does not meet
    the requirements of the job writes the reason into its termination message and does not join.
    """
    resources = run.job.spec.resources
    if resources.gpus_per_node and (code := _unfit(run)):
        return int(code)
    host, _, port = place.address.rpartition(":")
    if not _reachable(host, int(port)):
        print(f"no Ray head at {place.address} within {HEAD_SECONDS:.0f} s", file=sys.stderr)
        return ExitCode.FAILED
    address = socket.gethostbyname(host)  # KubeRay deletes the name's Service together with the pods
    _stay_joined(place, address, int(port))
    return ExitCode.FAILED


def _stay_joined(place: NodeRole, host: str, port: int) -> None:
    """Run Ray on this node until the head ends. Start it again if it cannot join, as happens on a busy machine."""
    for _ in range(JOIN_ATTEMPTS):
        started = time.monotonic()
        ray = subprocess.Popen([*_RAY, "start", "--block", *place.options], env=_environment(place))
        signal.signal(signal.SIGTERM, lambda *_, ray=ray: _leave(host, ray))
        killed = ray.wait() < 0
        if killed or time.monotonic() - started > JOIN_SECONDS or not _accepts(host, port):
            return
        print(f"Ray on this node could not join {place.address}: starting it again", file=sys.stderr, flush=True)


def _unfit(run: RunConfig) -> ExitCode:
    from finetune_trainer.launch.drive import report_outcome
    from finetune_trainer.preflight.gpu_node import require_fit_node

    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return report_outcome(reporter, lambda: require_fit_node(run))


def _leave(host: str, ray: subprocess.Popen[bytes]) -> None:
    """Let the driver save a checkpoint before this pod ends alone, by a drain or a preemption."""
    threading.Thread(target=_ask_to_stop, args=(host, ray), daemon=True).start()


def _ask_to_stop(host: str, ray: subprocess.Popen[bytes]) -> None:
    from finetune_trainer.launch.drive import read_token

    request = urllib.request.Request(
        f"http://{host}:{PORT}{STOP_PATH}", data=b"", headers={"Authorization": f"Bearer {read_token()}"}
    )
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=5).close()
    _until_driver_ends(host)
    ray.kill()  # the raylet would try to reconnect to its head for a while, and the next attempt waits for this pod


def _until_driver_ends(host: str) -> None:
    """Wait until the driver's port refuses connections, or is unreachable for `LOST_SECONDS` if its pod is gone."""
    reached = time.monotonic()
    while time.monotonic() - reached < LOST_SECONDS:
        try:
            socket.create_connection((host, PORT), timeout=1).close()
            reached = time.monotonic()
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # the network may come back
        time.sleep(RETRY_SECONDS)  # polls, because there is no event to wait for


def _reachable(host: str, port: int) -> bool:
    """Wait until the head pod runs: its name is then in DNS and its port is open."""
    deadline = time.monotonic() + HEAD_SECONDS
    while time.monotonic() < deadline:
        if _accepts(host, port):
            return True
        time.sleep(RETRY_SECONDS)  # polls, because there is no event to wait for
    return False


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
