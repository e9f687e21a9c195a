"""How the driver of this pod ended, for the program that Ray's job agent runs as a RayJob's entrypoint.

KubeRay takes a RayJob's outcome from its entrypoint, and replaces a head pod that ends. So with KubeRay the pod's
process writes the driver's exit code to a file and stays, the entrypoint reads it and ends as the driver did, and
KubeRay then takes the cluster down.
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
LOOK_SECONDS = 0.5


def write_exit_code(code: int, file: Path = END_FILE) -> None:
    """Write the driver's exit code, whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(str(code))
    new.replace(file)


def wait_for_exit_code(file: Path = END_FILE, message: Path = TERMINATION_LOG) -> int:
    """Wait for the driver's end, print what it said last, and return its exit code."""
    while not file.exists():
        time.sleep(LOOK_SECONDS)
    print(_last_words(message), flush=True)
    return int(file.read_text())


def _last_words(message: Path) -> str:
    try:
        return str(json.loads(message.read_text()).get("message", ""))
    except (OSError, ValueError):
        return ""


class TerminationSignal:
    """Notices SIGTERM and SIGINT, whichever handlers the driver installs for them meanwhile.

    Python writes each signal that has a Python handler to the wake-up descriptor, so none that comes before `wait` is
    missed. Create it in the main thread.
    """

    def __init__(self) -> None:
        self._told, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)

    def wait(self) -> None:
        """Return once this process has been told to end; at once where it was told before."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        while True:
            select.select([self._told], [], [])
            if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._told, 1024)):
                return
