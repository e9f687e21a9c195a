"""How the driver's exit code reaches a RayJob's entrypoint, and when its pod may end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from finetune_trainer.launch import driver_exit

WAITS = """
import os, signal, sys
from finetune_trainer.launch.driver_exit import TerminationSignal
farewell = TerminationSignal()
signal.signal(signal.SIGTERM, lambda *_: None)  # the driver's own, while it runs
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
print("waits", flush=True)
farewell.wait()
"""


def test_the_entrypoint_ends_as_the_driver_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end, message = tmp_path / "end", tmp_path / "message"
    message.write_text(json.dumps({"exitCode": 2, "message": "stages[0].data: no such file"}))
    threading.Timer(0.2, driver_exit.write_exit_code, (2, end)).start()
    assert driver_exit.wait_for_exit_code(end, message) == 2
    assert capsys.readouterr().out == "stages[0].data: no such file\n"


def test_a_driver_that_was_killed_left_no_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver_exit.write_exit_code(137, tmp_path / "end")
    assert driver_exit.wait_for_exit_code(tmp_path / "end", tmp_path / "none") == 137
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pod_stays_until_it_is_told_to_go(when: str) -> None:
    """SIGTERM arrives while the driver runs with its own handler, or after the driver has ended."""
    with subprocess.Popen([sys.executable, "-c", WAITS, when], stdout=subprocess.PIPE, env=os.environ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"waits\n"
            if when == "after":
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
