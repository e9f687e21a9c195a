"""The GPU check script runs all of its code on a CPU, and reports a check that hangs or fails as failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_checks.catalog import CHECKS, memory_table  # noqa: E402
from gpu_checks.machine import networks  # noqa: E402
from gpu_checks.record import Check, Json, Options, Result, Skipped, require  # noqa: E402

GPU_ALONE = {"imports", "collectives", "generation", "memory_table"}


def test_every_check_runs_on_a_cpu(tmp_path: Path) -> None:
    """The script runs without Ray's modules; it skips what a CPU cannot measure after the code has run."""
    gcc = shutil.which("gcc") is not None
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--no-ray", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == [*(check.name for check in CHECKS), "memory_table"], done.stderr
    assert [line for line in lines if line["ok"] is False] == [] and done.returncode == 0
    assert {line["name"] for line in lines if line["ok"] is None} == GPU_ALONE | (set() if gcc else {"compiler"})
    assert all("GPU" in line["skipped"] and line["values"] for line in lines if line["name"] in GPU_ALONE)
    assert all(line["seconds"] >= 0 for line in lines) and list(tmp_path.iterdir()) == []
    values = {line["name"]: line["values"] for line in lines}
    assert len(values["memory_table"]["rows"]) == 25
    assert not gcc or values["compiler"]["without"]["launcher"].startswith("Failed to find C compiler")
    assert values["out_of_memory"]["full"]["failure"] == "out of memory"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tiny=True, work=tmp_path)


def run(options: Options, *works: Any, seconds: float = 60) -> list[Result]:
    """Return the results of checks with these functions and a time limit; the last one is the table's."""
    checks = [Check(f"check{number}", 1, 1, work) for number, work in enumerate(works)]
    return list(gpu.run_all(checks, options, time.monotonic() + seconds))


def test_a_check_that_hangs_is_killed_with_all_that_it_started(options: Options, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "TINY_SECONDS", 1.0)
    pids = options.work / "pids"

    def hang(options: Options) -> Json:
        started = subprocess.Popen(["sleep", "600"])
        pids.write_text(str(started.pid))
        print("waits", flush=True)
        started.wait()
        return {}

    hung, after, _ = run(options, hang, lambda options: {"next": 1})
    assert hung.ok is False and hung.error is not None and hung.error["class"] == "TimeLimit"
    assert "waits" in hung.error["output"] and after.ok
    state = Path("/proc", pids.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # dead, possibly not yet reaped


def test_failures_have_their_class_and_the_exit_code(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    def full(options: Options) -> Json:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def wrong(options: Options) -> Json:
        require(1 + 1 == 3, "the sum is wrong", {"sum": 2})
        return {}

    def absent(options: Options) -> Json:
        raise Skipped("needs a GPU", {"tried": True})

    def die(options: Options) -> Json:
        os._exit(9)

    results = run(options, full, wrong, absent, die, lambda options: {"nan": float("nan")})
    assert gpu.report(results) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ok"] for line in lines] == [False, False, None, False, True, None]
    assert (lines[0]["error"]["class"], lines[0]["error"]["kind"]) == ("RuntimeError", "GPU out of memory")
    assert lines[1]["error"]["message"] == "the sum is wrong" and lines[1]["values"] == {"sum": 2}
    assert lines[2]["skipped"] == "needs a GPU" and lines[2]["values"] == {"tried": True}
    assert lines[3]["error"]["class"] == "ProcessDied" and lines[4]["values"] == {"nan": None}
    assert gpu.report([Result("good", True, 0.0), Result("left out", None, 0.0, skipped="no GPU")]) == 0


def test_what_no_longer_fits_the_budget_is_left_out(options: Options) -> None:
    checks = [Check("short", 1, 1, lambda options: {}), Check("long", 1, 50, lambda options: {})]
    short, long, _ = gpu.run_all(checks, Options(tiny=False, work=options.work), time.monotonic() + 30)
    assert short.ok and long.ok is None and long.skipped is not None and "needs 50" in long.skipped


@pytest.mark.parametrize(("part", "minutes"), [(1, 6), (2, 4)])
def test_a_part_fits_its_call(part: int, minutes: int) -> None:
    assert sum(check.seconds for check in CHECKS if check.part == part) <= gpu.BUDGETS[part] < 60 * minutes


def test_the_table_flags_what_is_outside_its_bounds() -> None:
    def row(name: str, ratio: float | None) -> Result:
        return Result(name, True, 0.0, {"memory": [{"name": name, "ratio": ratio}]})

    table = memory_table([row("a", 0.95), row("b", 1.2), row("c", 0.8), row("d", 1.1)])
    assert [one["flag"] for one in table.values["rows"]] == [False, True, True, False]
    assert table.ok is False and table.error is not None and table.error["message"].endswith("b, c")
    assert memory_table([row("a", 1.0)]).ok and memory_table([row("a", None)]).ok is None


def test_networks_of_nccl() -> None:
    """The lines are in the format of NCCL 2.29's log."""
    log = "NCCL INFO NET/Plugin: Could not find: libnccl-net.so\nNCCL INFO NET/Socket : Using [0]eth0:10.0.0.2<0>\n"
    assert networks(log + "NCCL INFO Using network Socket\n") == ["Socket"]
    assert networks("NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0\n") == ["IB"]
