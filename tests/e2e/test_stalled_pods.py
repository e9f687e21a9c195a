"""Stalled workers on real pods are detected in time, reported and restarted; running jobs raise no alarm.

With `FINETUNE_LONG_TESTS=1`, five random rounds of each cause and ten undisturbed jobs run.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import replace

import pytest
from support.cluster.finetune_jobs import Jobs
from support.e2e.campaign import new_chance, same_curve
from support.e2e.cluster_jobs import apply, curve, until_succeeded
from support.e2e.clusters import Cluster
from support.e2e.faults import Victim
from support.e2e.following import Following
from support.e2e.operator_pod import OperatorPod
from support.e2e.stalls import SAVE, STALLS, StallRound, stall_job, strike
from support.storage.s3_server import S3Server

ROUNDS = int(os.environ.get("FINETUNE_STALL_ROUNDS", "5"))
"""Rounds of each cause."""
STEPS, STEPS_A_ROUND, STEPS_BETWEEN = 300, 100, 5
"""Steps of a job, steps that must remain for another round, and steps between two rounds."""
BEGIN_SECONDS, GO_ON_SECONDS, END_SECONDS = 900, 600, 2400
CALM_JOBS, LANES, CALM_STEPS = 10, 3, 300


@pytest.mark.long
@pytest.mark.timeout(7200, func_only=True)
def test_four_causes_of_a_stall(
    cluster: Cluster, jobs: Jobs, operator: OperatorPod, s3: S3Server, namespace: str
) -> None:
    apply(cluster.admin, namespace, stall_job("calm", cluster.pod_template, steps=STEPS))
    until_succeeded(jobs, "calm", END_SECONDS)
    chance = new_chance(None)
    kinds = deque(kind for kind in STALLS for _ in range(ROUNDS))
    chance.shuffle(kinds)
    rounds: list[StallRound] = []
    for number in range(len(kinds)):
        if kinds:
            name = f"hit-{number}"
            following = Following(cluster.admin, namespace, name)
            victim = Victim(cluster, cluster.admin, operator, s3, namespace, name, following, chance)
            rounds += _job(victim, kinds)
            same_curve(victim, curve(s3, namespace, "calm"))
            print(f"{name}: every one of {STEPS} losses as undisturbed", flush=True)
    assert sorted(round.kind for round in rounds) == sorted(kind for kind in STALLS for _ in range(ROUNDS))
    assert not [round for round in rounds if not _told(round)]


def _job(victim: Victim, kinds: deque[str]) -> list[StallRound]:
    """Run one job that stalls at random moments until it has no steps left, and wait for its success."""
    apply(victim.admin, victim.namespace, stall_job(victim.name, victim.cluster.pod_template, steps=STEPS))
    rounds = []
    with victim.following as following:
        following.until_step(SAVE + 1, BEGIN_SECONDS)
        while kinds and following.samples[-1].step < STEPS - STEPS_A_ROUND:
            time.sleep(victim.chance.uniform(0, 5))
            rounds.append(strike(victim, kinds.popleft()))
            print(replace(rounds[-1], stacks=[f"{len(text)} characters" for text in rounds[-1].stacks]), flush=True)
            following.until_step(following.samples[-1].step + STEPS_BETWEEN, GO_ON_SECONDS)
        following.until(lambda it: it.status.get("phase") == "Succeeded", END_SECONDS, "success")
    return rounds


def _told(round: StallRound) -> bool:
    """Whether storage has the stacks with the last collective; a store that hangs cannot save them."""
    text = "\n".join(round.stacks)
    if round.kind == "hanging-store":
        return True
    stopped = round.kind != "stopped-worker" or "stopped by a signal (SIGSTOP)" in text
    return stopped and "last collective operation: gloo:" in text and "in run_stages" in text


@pytest.mark.long
@pytest.mark.timeout(5400, func_only=True)
def test_no_alarm_in_ten_undisturbed_jobs_with_evaluations_and_saves(
    cluster: Cluster, jobs: Jobs, operator: OperatorPod, s3: S3Server, namespace: str
) -> None:
    names = [f"calm-{number}" for number in range(CALM_JOBS)]
    for some in (names[start : start + LANES] for start in range(0, CALM_JOBS, LANES)):
        for name in some:
            body = stall_job(name, cluster.pod_template, steps=CALM_STEPS, save=10)
            stage = body["spec"]["stages"][1]["pretrain"]
            stage["data"] = stage["data"] | {"validationSplit": 0.2}
            stage["evalSteps"] = 20
            body["spec"]["resources"] |= {"memoryPerNode": "3Gi", "cpusPerNode": "300m"}
            apply(cluster.admin, namespace, body)
        for name in some:
            done = until_succeeded(jobs, name, 1200)
            assert [record["reason"] for record in done["status"]["attempts"]] == ["Completed"]
            assert "Stalled" not in {item["type"] for item in done["status"]["conditions"]}
            print(f"{name}: {CALM_STEPS} steps without an alarm", flush=True)
