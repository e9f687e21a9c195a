"""Faults one after the other on one long job, and what came of each."""

from __future__ import annotations

import json
import random
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.e2e.cluster_jobs import RUNS, apply, curve, long_job
from support.e2e.faults import BREAKING, KINDS, Victim
from support.e2e.following import Following, Recovery

Json = dict[str, Any]
SAVE = 20
FIRST_SECONDS, GO_ON_SECONDS, SETTLE_SECONDS, BREAK_SECONDS, PAUSE_SECONDS = 300, 900, 6, 60, 2
STEPS_A_ROUND = 150
"""So many are left for a round: it must not end with the job."""
_RESUMED = re.compile(r"resumes at step (\d+)")


@dataclass
class Round:
    """One fault: what status said, and how training came through."""

    kind: str
    step: int
    """The step at which it struck."""
    seconds: float
    """Until training went on; without a break the longest pause between two steps."""
    broken: bool
    repeated: int
    kept: int | None
    """The newest complete checkpoint before the strike."""
    resumed: int | None
    """The step that training went on from, by the driver's own word; None where it did not break off."""
    said: list[str] = field(default_factory=list)
    silences: list[str] = field(default_factory=list)
    """When and why this test could not look; a pause may be its own."""

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.broken and self.kept is not None and self.resumed is not None and self.resumed < self.kept:
            found.append(f"checkpoint {self.kept} was complete, and training went on from {self.resumed}")
        if self.repeated > SAVE:
            found.append(f"{self.repeated} steps were repeated, and every {SAVE} steps there is a checkpoint")
        return found


@dataclass
class Campaign:
    """Rounds of faults on one job of `steps` steps.

    Args:
        victim: all but the job, which is made here.
        told: is given each round as it ends.
    """

    victim: Victim
    steps: int
    told: Callable[[Round], None] = lambda round: None

    def run(self, kinds: deque[str]) -> list[Round]:
        """Apply the job, strike it with one kind after the other while it has steps left, and wait for its end.

        `kinds` keeps those that are left.

        Raises:
            AssertionError: training doesn't go on, or the job does not succeed.
        """
        victim, rounds = self.victim, []
        body = long_job(victim.name, victim.cluster.pod_template, steps=self.steps, save=SAVE)
        # A node has room for both pods, so that the job goes on where the other one is lost.
        body["spec"]["resources"] |= {"memoryPerNode": "5Gi", "cpusPerNode": "500m"}
        body["spec"]["kubernetes"]["engine"] = victim.engine
        apply(victim.admin, victim.namespace, body)
        with victim.following as following:
            following.until_step(SAVE + 1, FIRST_SECONDS)
            while kinds and following.samples[-1].step < self.steps - STEPS_A_ROUND:
                time.sleep(victim.chance.uniform(0, SETTLE_SECONDS / 2))  # the random moment
                rounds.append(self.strike(kinds.popleft()))
                self.told(rounds[-1])
            following.until(lambda it: it.status.get("phase") == "Succeeded", GO_ON_SECONDS * 2, "success")
        return rounds

    def strike(self, kind: str) -> Round:
        """One fault, and the wait until training goes on after it."""
        victim, following = self.victim, self.victim.following
        kept, step, struck = self._newest(), following.samples[-1].step, time.monotonic()
        KINDS[kind](victim)
        after = time.monotonic()
        found = self._settled(kind, struck, after)
        resumed = self._resumed() if found.broken else None
        repeated = max(found.repeated, step - resumed) if resumed is not None else found.repeated
        return Round(kind, step, round(found.seconds, 1), found.broken, repeated, kept, resumed,
                     following.said_since(struck), following.silences_since(struck))  # fmt: skip

    def _settled(self, kind: str, struck: float, after: float) -> Recovery:
        """How training came through, once it goes on a while after the fault was over.

        A break that was over between two looks shows by its pause; where not even that shows, it is not waited for
        forever.
        """

        def steady(it: Following) -> bool:
            if it.status.get("phase") == "Succeeded":
                return True
            found, last = it.recovery(struck), it.samples[-1]
            seen = kind not in BREAKING or (found and (found.broken or found.seconds > PAUSE_SECONDS))
            until = after + (SETTLE_SECONDS if seen else BREAK_SECONDS)
            return last.attempt == it.status.get("attempt") and last.at > until

        self.victim.following.until(steady, GO_ON_SECONDS, "training goes on")
        found = self.victim.following.recovery(struck)
        assert found is not None
        return found

    def _newest(self) -> int | None:
        """The newest complete checkpoint in the store."""
        fs, root = (
            self.victim.s3.fs,
            f"{RUNS}/{self.victim.namespace}/{self.victim.name}/stages/01-pretrain/checkpoints",
        )
        fs.invalidate_cache()
        steps = [int(path.split("/")[-2].rpartition("-")[2]) for path in fs.glob(f"{root}/*/manifest.json")]
        return max(steps, default=None)

    def _resumed(self) -> int | None:
        """Where the driver says that it went on."""
        pods = self.victim.pods()
        if not pods:
            return None
        name, namespace = pods[0]["metadata"]["name"], f"--namespace={self.victim.namespace}"
        text = self.victim.admin.kubectl("logs", namespace, name, check=False).stdout
        found = _RESUMED.findall(text)
        return int(found[-1]) if found else None


def late_image(victim: Victim) -> Round:
    """A job whose image is not there: what status says of it, and how it begins once the image has come."""
    body = long_job(victim.name, victim.cluster.pod_template, steps=SAVE, save=SAVE, nodes=1)
    image = f"finetune.test/{victim.name}:1"
    body["spec"]["kubernetes"] |= {"image": image, "engine": victim.engine}
    began = time.monotonic()
    with Following(victim.admin, victim.namespace, victim.name) as following:
        apply(victim.admin, victim.namespace, body)
        following.until(lambda it: any("Image" in text for _, text in it.words), FIRST_SECONDS, "a word on the image")
        time.sleep(victim.chance.uniform(0, SETTLE_SECONDS))
        came = time.monotonic()
        victim.cluster.tag_image(victim.cluster.trainer_image, image)
        following.until_step(1, GO_ON_SECONDS)
        seconds, said = following.samples[0].at - came, following.said_since(began)
        following.until(lambda it: it.status.get("phase") == "Succeeded", GO_ON_SECONDS, "success")
    return Round("image", 0, round(seconds, 1), False, 0, None, None, said)


def check(rounds: list[Round]) -> None:
    """No checkpoint lost, no more repeated than is saved at once.

    Raises:
        AssertionError: the message names each round with what is wrong.
    """
    wrong = {f"{number}. {round.kind}": round.faults for number, round in enumerate(rounds, 1) if round.faults}
    assert not wrong, wrong


def same_curve(victim: Victim, calm: list[tuple[int, float]]) -> None:
    """The curve of the job is the undisturbed one's, to the bit, with every step in it once.

    Raises:
        AssertionError: it isn't.
    """
    hit = curve(victim.s3, victim.namespace, victim.name)
    assert [step for step, _ in hit] == [step for step, _ in calm]
    differing = [(step, a, b) for (step, a), (_, b) in zip(hit, calm, strict=True) if a != b]
    assert not differing, f"{len(differing)} losses differ, first {differing[0]}"


def write(rounds: list[Round], path: Path) -> None:
    path.write_text(json.dumps([asdict(round) for round in rounds], indent=1))


def new_chance(seed: int | None) -> random.Random:
    """A generator whose seed is printed, so that a run can be repeated."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    return random.Random(seed)
