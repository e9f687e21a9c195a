"""A series of faults on one long job, and the recovery from each."""

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
"""Steps that must remain for a round, so that it does not end with the job."""
_RESUMED = re.compile(r"resumes at step (\d+)")


@dataclass
class Round:
    """One fault: the statuses, and the recovery of training."""

    kind: str
    step: int
    """The step at which the fault began."""
    seconds: float
    """Until training continued; without an interruption, the longest pause between two steps."""
    broken: bool
    repeated: int
    kept: int | None
    """The newest complete checkpoint before the fault."""
    resumed: int | None
    """The step from which training continued, according to the driver; None without an interruption."""
    said: list[str] = field(default_factory=list)
    silences: list[str] = field(default_factory=list)
    """When and why this test could not observe the job, which may itself look like a pause."""

    @property
    def faults(self) -> list[str]:
        """Return the violations: a lost checkpoint, or too many repeated steps."""
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
        victim: the cluster and the name of the job, which is created here.
        told: receives each round as it ends.
    """

    victim: Victim
    steps: int
    told: Callable[[Round], None] = lambda round: None

    def run(self, kinds: deque[str]) -> list[Round]:
        """Apply the job, inject one fault after the other while it has steps left, and wait for its end.

        `kinds` keeps the faults that are left.

        Raises:
            AssertionError: training does not continue, or the job does not succeed.
        """
        victim, rounds = self.victim, []
        body = long_job(victim.name, victim.cluster.pod_template, steps=self.steps, save=SAVE)
        # A node has room for both pods, so that the job continues where one node is lost.
        body["spec"]["resources"] |= {"memoryPerNode": "5Gi", "cpusPerNode": "500m"}
        body["spec"]["kubernetes"]["engine"] = victim.engine
        apply(victim.admin, victim.namespace, body)
        with victim.following as following:
            following.until_step(SAVE + 1, FIRST_SECONDS)
            while kinds and following.samples[-1].step < self.steps - STEPS_A_ROUND:
                time.sleep(victim.chance.uniform(0, SETTLE_SECONDS / 2))
                rounds.append(self.strike(kinds.popleft()))
                self.told(rounds[-1])
            following.until(lambda it: it.status.get("phase") == "Succeeded", GO_ON_SECONDS * 2, "success")
        return rounds

    def strike(self, kind: str) -> Round:
        """Inject one fault and wait until training continues."""
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
        """Wait until training has continued for a while after the fault, and return the recovery.

        An interruption that no sample shows is visible as a pause; the wait for a pause has a limit.
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
        """Return the newest complete checkpoint in the store."""
        fs, root = (
            self.victim.s3.fs,
            f"{RUNS}/{self.victim.namespace}/{self.victim.name}/stages/01-pretrain/checkpoints",
        )
        fs.invalidate_cache()
        steps = [int(path.split("/")[-2].rpartition("-")[2]) for path in fs.glob(f"{root}/*/manifest.json")]
        return max(steps, default=None)

    def _resumed(self) -> int | None:
        """Return the step from which training continued, according to the driver's log."""
        pods = self.victim.pods()
        if not pods:
            return None
        name, namespace = pods[0]["metadata"]["name"], f"--namespace={self.victim.namespace}"
        text = self.victim.admin.kubectl("logs", namespace, name, check=False).stdout
        found = _RESUMED.findall(text)
        return int(found[-1]) if found else None


def late_image(victim: Victim) -> Round:
    """Run a job whose image is missing at first, and return its statuses and the time of its start after that."""
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
    """Check that no checkpoint was lost and that no more steps were repeated than lie between two checkpoints.

    Raises:
        AssertionError: the message names each round with its violations.
    """
    wrong = {f"{number}. {round.kind}": round.faults for number, round in enumerate(rounds, 1) if round.faults}
    assert not wrong, wrong


def same_curve(victim: Victim, calm: list[tuple[int, float]]) -> None:
    """Check that the loss curve has every step once and equals the undisturbed curve bit by bit.

    Raises:
        AssertionError: the curves differ.
    """
    hit = curve(victim.s3, victim.namespace, victim.name)
    assert [step for step, _ in hit] == [step for step, _ in calm]
    differing = [(step, a, b) for (step, a), (_, b) in zip(hit, calm, strict=True) if a != b]
    assert not differing, f"{len(differing)} losses differ, first {differing[0]}"


def write(rounds: list[Round], path: Path) -> None:
    path.write_text(json.dumps([asdict(round) for round in rounds], indent=1))


def new_chance(seed: int | None) -> random.Random:
    """Return a random generator and print its seed, so that a run can be repeated."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    return random.Random(seed)
