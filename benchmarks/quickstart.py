"""The cost of a newcomer's first command: `python benchmarks/quickstart.py [REPOSITORY]`.

Clones the repository into an empty directory, runs `make quickstart` there with an empty cache, and prints wall time,
the peak resident memory of all its processes (their sum, and the largest one) and every stage's final metrics. Shared
pages (libraries, Ray's object store) count in each process that maps them, so the sum is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5


@dataclass
class Peak:
    """Peak resident bytes."""

    total: int = 0
    largest: int = 0

    def sample(self, root: psutil.Process) -> None:
        """Sample a process and all its descendants."""
        sizes = [size for process in [root, *root.children(recursive=True)] if (size := _resident(process))]
        self.total = max(self.total, sum(sizes))
        self.largest = max(self.largest, *sizes, 0)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended since it was listed
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--keep", type=Path, help="directory to clone into, kept afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clone = options.keep or Path(scratch, "clone")
        subprocess.run(["git", "clone", "--quiet", str(options.repository), str(clone)], check=True)
        timed("make install", ["make", "install"], clone)
        timed("make quickstart, installed", ["make", "quickstart"], clone)
        for done in sorted(clone.glob("runs/quickstart/stages/*/done.json")):
            facts = json.loads(done.read_text())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in facts["metrics"].items())
            print(f"{done.parent.name}: {facts['seconds']:.0f} s of training, {shown}")


def timed(what: str, command: list[str], directory: Path) -> None:
    """Run a command and print its time and memory.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    output, peak, started = directory.parent / f"{directory.name}.log", Peak(), time.monotonic()
    with output.open("w") as log:
        env = os.environ | {"FINETUNE_CACHE": str(directory / "cache")}
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT, env=env)
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(psutil.Process(process.pid), peak, ended))
        sampler.start()
        process.wait()
        ended.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"{what} failed:\n{output.read_text()[-3000:]}")
    gib = 2**30
    print(
        f"{what}: {time.monotonic() - started:.0f} s, peak {peak.total / gib:.2f} GiB in all processes, "
        f"{peak.largest / gib:.2f} GiB in the largest",
        flush=True,
    )


def _sample(root: psutil.Process, peak: Peak, ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        try:
            peak.sample(root)
        except psutil.NoSuchProcess:
            return


if __name__ == "__main__":
    main()
