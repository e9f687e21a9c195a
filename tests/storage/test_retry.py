"""Waits for a store that overlap are reported until the last of them ends."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial

import pytest

from finetune_trainer.storage import retry


def test_a_wait_is_told_until_the_last_of_several_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(retry._waits, "report", None)  # monkeypatch restores the previous listener
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.01)
    retry.on_waiting(told.append)
    back = {name: threading.Event() for name in "ab"}
    tries, tried_again = Counter[str](), {name: threading.Event() for name in "ab"}

    def work(name: str) -> None:
        if tries[name] > 0:
            tried_again[name].set()  # its wait has been reported, or another wait is being reported
        tries[name] += 1
        if not back[name].is_set():
            raise TimeoutError(name)

    threads = {
        name: threading.Thread(target=retry.call_with_retries, args=(partial(work, name), name, 60)) for name in "ab"
    }
    for name in "ab":
        threads[name].start()
        assert tried_again[name].wait(30)
    back["a"].set()
    threads["a"].join(30)
    back["b"].set()
    threads["b"].join(30)
    assert told == ["a: TimeoutError: a", "b: TimeoutError: b", ""]
