"""A pod of an attempt, on either engine: one starts the Ray head and drives; the others join it and leave with it.

In jobs without GPUs a second process imports the libraries while Ray starts, and the driver and Ray's workers are
forked from it (`forks`), so that they need not import them again.
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
from finetune_trainer.forks.client import run_fork
from finetune_trainer.launch.driver_exit import Farewell, write_end
from finetune_trainer.launch.fork_imports import forks
from finetune_trainer.launch.node_role import Seat, seat
from finetune_trainer.plan.threads import threads_per_worker
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.runtime import apply_environment, quiet_environment

HEAD_SECONDS = 1800.0
"""How long a node waits for the head: its image may still be on its way."""
RETRY_SECONDS = 0.5
LOST_SECONDS = 5.0
"""A driver that is not reached for so long has ended."""
SIGTERM_EXIT = 128 + signal.SIGTERM
_RAY = [sys.executable, "-m", "finetune_trainer.forks.start"]
_DRIVE = Path(__file__).with_name("driver_program.py")


def run_node(config: Path) -> int:
    """What every pod runs; returns its exit code. Pod 0's is the attempt's, by `ExitCode`."""
    # The first process of a container ignores every signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_EXIT))
    run = RunConfig.model_validate_json(config.read_text())
    resources = run.job.spec.resources
    apply_environment(quiet_environment(accelerator=bool(resources.gpus_per_node)))
    # A lost head ends its nodes soon, so that the pods make room for the next attempt's.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_worker(resources)))
    place = seat(resources)
    with forks(run, print):
        return _head(config, place) if place.head else _worker(run, place)


def _head(config: Path, place: Seat) -> int:
    """Start Ray, then drive. With KubeRay stay after that until the cluster is taken down (`driver_end`)."""
    from finetune_trainer.launch.drive import drive

    farewell = Farewell() if place.watched else None
    subprocess.run([*_RAY, "start", *place.options], check=True, stdout=subprocess.DEVNULL, env=_environment(place))
    os.environ["RAY_ADDRESS"] = place.address
    code = run_fork([str(_DRIVE), str(config)])
    code = int(drive(config)) if code is None else code
    if farewell is not None:
        write_end(code)
        farewell.wait()
    return code


def _environment(place: Seat) -> dict[str, str]:
    return {**os.environ, **place.environment}


def _worker(run: RunConfig, place: Seat) -> int:
    """Join, stay as long as the head does.

    Returns FAILED where the head never came or left; the Job then ends, and this pod with it. A node that does not suit
    the job says so in its termination message, and does not join.
    """
    resources = run.job.spec.resources
    if resources.gpus_per_node and (code := _unfit(run)):
        return int(code)
    host, _, port = place.address.rpartition(":")
    if not _reachable(host, int(port)):
        print(f"no Ray head at {place.address} within {HEAD_SECONDS:.0f} s", file=sys.stderr)
        return ExitCode.FAILED
    address = socket.gethostbyname(host)  # KubeRay deletes the name's Service together with the pods
    ray = subprocess.Popen([*_RAY, "start", "--block", *place.options], env=_environment(place))
    signal.signal(signal.SIGTERM, lambda *_: _leave(address, ray))
    ray.wait()
    return ExitCode.FAILED


def _unfit(run: RunConfig) -> ExitCode:
    from finetune_trainer.launch.drive import say_last_word
    from finetune_trainer.preflight.gpu_node import require_fit_node

    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])
    return say_last_word(reporter, lambda: require_fit_node(run))


def _leave(host: str, ray: subprocess.Popen[bytes]) -> None:
    """This pod alone is to go (a drain, a preemption): the driver saves a checkpoint first, and its end is ours."""
    threading.Thread(target=_ask_to_stop, args=(host, ray), daemon=True).start()


def _ask_to_stop(host: str, ray: subprocess.Popen[bytes]) -> None:
    from finetune_trainer.launch.drive import _token

    request = urllib.request.Request(
        f"http://{host}:{PORT}{STOP_PATH}", data=b"", headers={"Authorization": f"Bearer {_token()}"}
    )
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=5).close()
    _until_driver_ends(host)
    ray.kill()  # by itself the raylet would look for its head for a while, and the next attempt waits for this pod


def _until_driver_ends(host: str) -> None:
    """Its port refuses connections then; a driver whose pod is gone may only not be reached any more."""
    reached = time.monotonic()
    while time.monotonic() - reached < LOST_SECONDS:
        try:
            socket.create_connection((host, PORT), timeout=1).close()
            reached = time.monotonic()
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # a network that is away may come back
        time.sleep(RETRY_SECONDS)  # there is no event to wait for


def _reachable(host: str, port: int) -> bool:
    """Wait for the head: its name comes into DNS, and its port opens, once its pod runs."""
    deadline = time.monotonic() + HEAD_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return True
        except OSError:
            time.sleep(RETRY_SECONDS)  # there is no event to wait for before the connection
    return False
