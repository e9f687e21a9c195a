"""Passes the driver's exit code to the entrypoint of a RayJob, which Ray's job agent runs in the same pod.

KubeRay takes the outcome of a RayJob from its entrypoint, and replaces a head pod that ends. So with KubeRay the pod's
process writes the driver's exit code to a file and keeps running; the entrypoint reads the file and ends with the same
code; KubeRay then deletes the cluster.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from pathlib import Path

from finetune_trainer.launch.drive import TERMINATION_LOG

END_FILE = Path("/tmp/finetune-driver-end")
POLL_SECONDS = 0.5


def write_exit_code(code: int, file: Path = END_FILE) -> None:
    """Write the driver's exit code atomically."""
    new = file.with_suffix(".new")
    new.write_text(str(code))
    new.replace(file)


def wait_for_exit_code(file: Path = END_FILE, message: Path = TERMINATION_LOG) -> int:
    """Wait until the driver has ended, print its termination message and return its exit code."""
    while not file.exists():
        time.sleep(POLL_SECONDS)
    print(_termination_message(message), flush=True)
    return int(file.read_text())


def _termination_message(message: Path) -> str:
    try:
        return str(json.loads(message.read_text()).get("message", ""))
    except (OSError, ValueError):
        return ""


class TerminationSignal:
    """Records SIGTERM and SIGINT, independent of the handlers that the driver installs for them.

    Python writes each signal that has a Python handler to the wake-up descriptor, so a signal that arrives before
    `wait` is not missed. Create it in the main thread.
    """

    def __init__(self) -> None:
        self._received, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def wait(self) -> None:
        """Wait for SIGTERM or SIGINT. Return at once if one has arrived since this object was created."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        while True:
            select.select([self._received], [], [])
            if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._received, 1024)):
                return
