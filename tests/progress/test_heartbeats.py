"""Heartbeats of real processes, some of which hang: what counts as progress, and what a report contains."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_api.report import AttemptReport
from finetune_trainer.heartbeat import Heartbeat, Phase, in_phase, process_heartbeat
from finetune_trainer.launch import drive
from finetune_trainer.launch.driver_watch import DriverWatch
from finetune_trainer.launch.stack_dumps import Stacks, collect, kill
from finetune_trainer.launch.stall_diagnosis import culprit, record
from finetune_trainer.launch.stall_watch import BEGIN_SECONDS, LEAST_SECONDS, STEPS, Stall, StallWatch
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.progress.heartbeats import HeartbeatThread, WorkerHeartbeat, first_heartbeat
from finetune_trainer.progress.process_activity import activity, state

WORKER = """
import os, sys, threading, time
from finetune_trainer.launch.stack_dumps import answer_inquiries
answer_inquiries()
def a_read_that_hangs():
    print("ready", flush=True)
    open(sys.argv[1]).read()
def a_loader_that_sleeps():
    print("ready", flush=True)
    threading.Event().wait()
def a_long_merge():
    print("ready", flush=True)
    while True: sum(range(1000))
def two_processes():
    ended, held = os.pipe()
    if os.fork():
        print("ready", flush=True)
    else:
        os.close(held)
    deep(ended, 80)
def deep(ended, frames):
    return deep(ended, frames - 1) if frames else os.read(ended, 1)
globals()[sys.argv[2]]()
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Return a function that starts a process with one of the faults of `WORKER`."""
    import os

    pipe, begun = tmp_path / "pipe", []
    os.mkfifo(pipe)

    def start(word: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, str(pipe), word]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout.readline() == "ready\n"
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.parametrize("word", ["a_read_that_hangs", "a_loader_that_sleeps"])
def test_the_stacks_of_a_process_that_hangs(begin: Callable[[str], subprocess.Popen[str]], word: str) -> None:
    process = begin(word)
    found = collect([process.pid])[process.pid]
    assert f"in {word}" in found.text and found.told == ""
    again = collect([process.pid])[process.pid]
    assert again.text.count(f"in {word}") == found.text.count(f"in {word}"), "only what was written since"


def test_the_stacks_of_a_process_and_of_its_child_do_not_mix(begin: Callable[[str], subprocess.Popen[str]]) -> None:
    process = begin("two_processes")
    lines = collect([process.pid])[process.pid].text.splitlines()
    assert sum("in deep" in line for line in lines) == 162
    frame = re.compile(
        r'  File ".*", line \d+ in \S+|(Current thread|Thread) 0x\w+ \(most recent call first\):|child \d+: .*'
    )
    assert [line for line in lines if line and not frame.fullmatch(line)] == []


def test_a_stopped_process_is_told_by_its_state_and_can_be_ended(begin: Callable[[str], subprocess.Popen[str]]) -> None:
    process = begin("a_loader_that_sleeps")
    process.send_signal(signal.SIGSTOP)
    found = collect([process.pid])[process.pid]
    assert (found.state, found.told) == ("T", "stopped by a signal (SIGSTOP)")
    assert "does not react" in found.text
    kill([process.pid])
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert collect([process.pid])[process.pid].told == "gone" and state(process.pid) == ""


def test_a_process_without_the_handler_is_left_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert "has not begun to answer" in collect([process.pid])[process.pid].text
        assert process.poll() is None
        process.kill()


def test_work_shows_in_the_kernel_s_accounts_and_waiting_does_not(
    begin: Callable[[str], subprocess.Popen[str]],
) -> None:
    pids = {word: begin(word).pid for word in ("a_long_merge", "a_read_that_hangs", "a_loader_that_sleeps")}
    before = {word: activity(pid) for word, pid in pids.items()}
    deadline = time.monotonic() + 20
    while not activity(pids["a_long_merge"]).works_since(before["a_long_merge"], 1.0):
        assert time.monotonic() < deadline
    works = {word for word, pid in pids.items() if activity(pid).works_since(before[word], 1.0)}
    assert works == {"a_long_merge"}


class Heard:
    """A receiver of heartbeats."""

    def __init__(self) -> None:
        self.beats: list[WorkerHeartbeat] = []
        self.news = threading.Event()

    def __call__(self, beat: WorkerHeartbeat) -> None:
        self.beats.append(beat)
        self.news.set()

    def next(self) -> WorkerHeartbeat:
        assert self.news.wait(20)
        self.news.clear()
        return self.beats[-1]


def test_a_beat_and_a_phase_are_told() -> None:
    heard, own = Heard(), Heartbeat()
    with HeartbeatThread(first_heartbeat(1, 2, "node-a", "id"), own, heard):
        first = heard.next()
        own.enter_phase(Phase("forward pass", measured=True, step=3, order=1))
        second = heard.next()
    assert (first.rank, first.workers, first.host, first.progress) == (1, 2, "node-a", 1)
    assert (second.phase.name, second.phase.step, second.progress) == ("forward pass", 3, 2)


def test_work_counts_outside_of_measured_phases_alone() -> None:
    """A worker that waits in NCCL spins, so its CPU time is no progress there; a merge has only its CPU time."""
    heard, own = Heard(), Heartbeat()
    with HeartbeatThread(first_heartbeat(0, 1, "a", "id"), own, heard):
        heard.next()
        deadline = time.monotonic() + 20
        while len(heard.beats) < 2:  # this loop is the work
            assert time.monotonic() < deadline
        own.enter_phase(Phase("backward pass", measured=True))
        deadline = time.monotonic() + 20
        while heard.beats[-1].phase.name != "backward pass":
            assert time.monotonic() < deadline
        told, until = len(heard.beats), time.monotonic() + 2.5
        while time.monotonic() < until:
            pass
        assert len(heard.beats) == told


def test_a_phase_within_a_phase_keeps_its_place_and_gives_it_back() -> None:
    before = process_heartbeat().phase  # left by an earlier test in this process
    with in_phase("saving", step=7, order=3), in_phase("waiting", measured=True, waits=True):
        assert process_heartbeat().phase == Phase("waiting", True, True, 7, 3)
    assert process_heartbeat().phase == before


def beat(
    rank: int, progress: int, step: int = 4, order: int = 2, name: str = "backward pass", **fields: object
) -> WorkerHeartbeat:
    phase = Phase(name, True, bool(fields.get("waits")), step, order)
    return WorkerHeartbeat(rank, 2, 100 + rank, f"node-{rank}", f"id-{rank}", progress, phase)


def beats(*found: WorkerHeartbeat) -> dict[int, WorkerHeartbeat]:
    return {one.rank: one for one in found}


def test_any_worker_s_progress_is_progress_and_none_before_the_first_beat_is_a_stall() -> None:
    watch = StallWatch(10)
    assert watch.look(0, {}) is None and watch.look(100, {}) is None, "the libraries take longer to import"
    assert watch.look(101, beats(beat(0, 1), beat(1, 1))) is None
    assert watch.look(110, beats(beat(0, 2), beat(1, 1))) is None
    assert watch.look(119, beats(beat(0, 2), beat(1, 1))) is None
    stall = watch.look(120, beats(beat(0, 2), beat(1, 1)))
    assert stall is not None and stall.seconds == 10


def test_workers_that_never_say_a_word_stall_once_ray_has_room_for_them() -> None:
    watch = StallWatch(10, workers=4)
    assert watch.look(0, {}) is None
    assert watch.look(BEGIN_SECONDS * 5, {}, queued=True) is None, "a queue takes as long as it takes"
    assert watch.look(BEGIN_SECONDS * 6 - 1, {}) is None
    stall = watch.look(BEGIN_SECONDS * 6, {})
    assert stall is not None and not stall.begun
    assert (stall.workers, stall.seconds, stall.words(stall.culprit)) == (4, BEGIN_SECONDS, "worker 0: has not begun")
    slow = StallWatch(2 * int(BEGIN_SECONDS))
    slow.look(0, {})
    assert slow.look(BEGIN_SECONDS * 2 - 1, {}) is None and slow.look(BEGIN_SECONDS * 2, {}) is not None
    off = StallWatch(0)
    assert off.look(0, {}) is None and off.look(1e9, {}) is None


@pytest.mark.parametrize(
    ("found", "behind"),
    [
        (beats(beat(0, 9), beat(1, 9, order=0, name="loading rows")), 1),
        (beats(beat(0, 9, step=5), beat(1, 9)), 1),
        (beats(beat(0, 9, order=3, name="saving"), beat(1, 9, order=2, waits=True)), 0),
        (beats(beat(0, 9)), 1),
        (beats(beat(0, 9, waits=True), beat(1, 8, step=3, waits=True)), 1),
    ],
    ids=["loads rows", "a step behind", "saves while the other waits", "never began", "all wait"],
)
def test_who_is_behind(found: dict[int, WorkerHeartbeat], behind: int) -> None:
    assert Stall(60, found, 2).culprit == behind
    assert f"worker {behind}" in Stall(60, found, 2).words(behind)


def test_a_worker_that_cannot_run_is_the_one_behind_whatever_the_phases_say() -> None:
    stall = Stall(60, beats(beat(0, 9, step=3), beat(1, 9)), 2)
    fine, stopped = Stacks("S", "File x"), Stacks("T", "")
    assert culprit(stall, {0: fine, 1: fine}) == 0
    assert culprit(stall, {0: fine, 1: stopped}) == 1
    assert culprit(stall, {0: fine}) == 1, "its node does not answer"
    assert culprit(stall, {}) == 0, "no node answers: that says nothing about any of them"
    text = record(stall, {0: fine})
    assert "worker 1, node node-1 does not answer" in text and "File x" in text


def test_the_limit_follows_the_job_s_own_steps_and_is_minutes_at_least() -> None:
    watch = StallWatch("auto")
    for step in range(5):
        watch.look(step * 100.0, beats(beat(0, step, step=step)))
    assert watch.limit == STEPS * 100
    quick = StallWatch("auto")
    for step in range(5):
        quick.look(float(step), beats(beat(0, step, step=step)))
    assert quick.limit == LEAST_SECONDS >= 60
    assert StallWatch(0).limit is None
    off = StallWatch(0)
    off.look(0, beats(beat(0, 1)))
    assert off.look(1e9, beats(beat(0, 1))) is None


def test_a_driver_that_hangs_is_told_with_its_stacks_and_one_that_waits_for_others_is_not() -> None:
    told: list[str] = []
    ended = threading.Event()

    def hung(text: str) -> None:
        told.append(text)
        ended.set()

    def preparing(data: threading.Event) -> None:
        data.wait()

    with DriverWatch(2, hung) as watch:
        with watch.paused():
            assert not ended.wait(3.5)
        never = threading.Event()
        thread = threading.Thread(target=preparing, args=(never,), daemon=True)
        thread.start()
        assert ended.wait(20)
        never.set()
    assert "no progress of the driver for 2 s" in told[0] and "in preparing" in told[0]


def test_a_driver_that_never_gets_an_answer_about_its_workers_is_told_and_one_that_waits_for_them_is_not() -> None:
    told: list[str] = []
    ended = threading.Event()

    def hung(text: str) -> None:
        told.append(text)
        ended.set()

    with DriverWatch(2, hung) as watch, watch.paused():
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            with watch.listening():  # each wait is short
                pass
            assert not ended.wait(0.2)
        with watch.listening():
            assert ended.wait(20)
    assert "no progress of the driver for 2 s while waiting for messages of the workers" in told[0]


def test_the_last_word_of_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "TERMINATION_LOG", tmp_path / "log")
    monkeypatch.setenv("FINETUNE_NODE_NAME", "node-b")
    code = drive.report_hung_driver(AttemptReporter(["sft"]), "no progress of the driver for 9 s; its stacks:\nFile x")
    report = AttemptReport.model_validate_json((tmp_path / "log").read_text())
    assert code == 1 and (report.node, report.exit_code) == ("node-b", 1)
    assert report.stalled == "no progress of the driver for 9 s" and "File x" not in (report.message or "")


def test_what_was_found_of_stalled_workers_outlives_a_driver_that_hangs_in_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that hangs stalls the workers first, and then the driver that writes its report there."""
    monkeypatch.setattr(drive, "TERMINATION_LOG", tmp_path / "log")
    monkeypatch.setenv("FINETUNE_NODE_NAME", "the-driver-s")
    reporter = AttemptReporter(["sft"])
    reporter.stalled("no progress for 20 s; behind is worker 1", "node-b")
    drive.report_hung_driver(
        reporter, "no progress of the driver for 20 s while writing the report; its stacks:\nFile x"
    )
    report = AttemptReport.model_validate_json((tmp_path / "log").read_text())
    assert (report.stalled, report.node) == ("no progress for 20 s; behind is worker 1", "node-b")
    assert report.message == report.stalled
