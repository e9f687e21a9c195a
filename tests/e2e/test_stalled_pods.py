"""Workers that hang on real pods: noticed in time, told, and mended without help; and no alarm where nothing hangs.

With `FINETUNE_LONG_TESTS=1` five random rounds of each cause, and ten undisturbed jobs.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from campaign import new_chance, same_curve
from cluster_jobs import apply, curve, until_succeeded
from clusters import Cluster
from faults import Victim
from finetune_jobs import Jobs
from following import Following
from operator_pod import OperatorPod
from s3_server import S3Server
from stalls import STALLS, TIMEOUT, stall_job

LONG = os.environ.get("FINETUNE_LONG_TESTS") == "1"
ROUNDS, STEPS, SAVE = 5, 6000, 20
NOTICE_SECONDS, GO_ON_SECONDS = 2 * TIMEOUT, 300


@pytest.mark.long
@pytest.mark.timeout(5400, func_only=True)
def test_four_causes_of_a_stall(
    cluster: Cluster, jobs: Jobs, operator: OperatorPod, s3: S3Server, namespace: str
) -> None:
    apply(cluster.admin, namespace, stall_job("calm", cluster.pod_template, steps=STEPS, save=SAVE))
    until_succeeded(jobs, "calm", 2400)
    chance = new_chance(None)
    following = Following(cluster.admin, namespace, "hit")
    victim = Victim(cluster, cluster.admin, operator, s3, namespace, "hit", following, chance)
    apply(cluster.admin, namespace, stall_job("hit", cluster.pod_template, steps=STEPS, save=SAVE))
    kinds = [kind for kind in STALLS for _ in range(ROUNDS)]
    chance.shuffle(kinds)
    with following:
        following.until_step(SAVE + 1, GO_ON_SECONDS)
        for kind in kinds:
            _round(victim, kind, chance)
        following.until(lambda it: it.status.get("phase") == "Succeeded", 2400, "success")
    same_curve(victim, curve(s3, namespace, "calm"))


def _round(victim: Victim, kind: str, chance: random.Random) -> None:
    """One stall at a random moment: noticed within twice the timeout, told as `Stalled`, and training goes on."""
    time.sleep(chance.uniform(0, 5))  # the random moment
    seen = len(victim.following.status.get("attempts") or [])
    struck = time.monotonic()
    undo = STALLS[kind](victim)
    try:
        victim.following.until(lambda it: _stalled(it) or _ended(it, seen), NOTICE_SECONDS, f"{kind} is noticed")
    finally:
        undo()
    victim.goes_on(struck)
    if kind != "dead-network":  # Ray may notice that one first
        assert any(record["reason"] == "Stalled" for record in victim.following.status["attempts"]), kind


def _stalled(following: Following) -> bool:
    conditions = following.status.get("conditions") or []
    return any(item["type"] == "Stalled" and item["status"] == "True" for item in conditions)


def _ended(following: Following, before: int) -> bool:
    ended = [record for record in following.status.get("attempts") or [] if "endTime" in record]
    return len(ended) >= before


@pytest.mark.long
@pytest.mark.timeout(5400, func_only=True)
def test_no_alarm_in_ten_undisturbed_jobs_with_evaluations_and_saves(
    cluster: Cluster, jobs: Jobs, operator: OperatorPod, s3: S3Server, namespace: str
) -> None:
    for number in range(10):
        body = stall_job(f"calm-{number}", cluster.pod_template, steps=400, save=10)
        stage = body["spec"]["stages"][1]["pretrain"]
        stage["data"] = stage["data"] | {"validationSplit": 0.2}
        stage["evalSteps"] = 20
        apply(cluster.admin, namespace, body)
        done = until_succeeded(jobs, f"calm-{number}", 500)
        assert [record["reason"] for record in done["status"]["attempts"]] == ["Completed"]
        assert "Stalled" not in {item["type"] for item in done["status"]["conditions"]}
