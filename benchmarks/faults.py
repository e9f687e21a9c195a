"""Inject faults at random moments on a cluster of two real nodes: `python benchmarks/faults.py --rounds 5`, as root.

Each kind of fault hits a long job of two pods `--rounds` times. An undisturbed job runs first; every other job must
have its loss at every step. Prints a line for each round and ends with a table. See `tests/e2e` for what the cluster
needs; the kinds are those of `tests/support/e2e/faults.py`, and `image`, a job whose image arrives late.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict, deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from kubernetes import client
from support.cluster.finetune_jobs import Jobs
from support.e2e.campaign import Campaign, Round, late_image, new_chance, same_curve, write
from support.e2e.cluster_jobs import apply, curve, long_job, until_succeeded
from support.e2e.faults import KINDS, Victim
from support.e2e.following import Following
from support.e2e.kuberay_process import kuberay
from support.e2e.stage import set_up

CALM_SECONDS = 1800
IMAGE = "image"


def main() -> None:
    """Run the rounds in random order, over as many jobs as they need."""
    arguments = _arguments()
    chance = new_chance(arguments.seed)
    kinds = [kind for kind in arguments.kinds.split(",") for _ in range(arguments.rounds)]
    chance.shuffle(kinds)
    with ExitStack() as stack:
        victim = replace(set_up(stack, chance), engine=arguments.engine)
        if arguments.engine == "kuberay":
            stack.enter_context(kuberay(victim.cluster, arguments.kuberay_manager, arguments.kuberay_crds))
        rounds = [late_image(replace(victim, name=f"late-{n}")) for n in range(kinds.count(IMAGE))]
        left = deque(kind for kind in kinds if kind != IMAGE)
        calm = _calm(victim, arguments.steps) if left else []
        number = 0
        while left:
            number += 1
            rounds += _job(victim, f"hit-{number}", arguments.steps, left, calm)
            write(rounds, arguments.out)
    write(rounds, arguments.out)
    print(_table(rounds))
    sys.exit(any(round.faults for round in rounds))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    parser.add_argument("--kinds", default=",".join([*KINDS, IMAGE]), help="some of them, joined by commas")
    parser.add_argument("--steps", type=int, default=3000, help="of a job: a new one begins when they are used up")
    parser.add_argument("--engine", choices=("job", "kuberay"), default="job")
    parser.add_argument("--kuberay-manager", type=Path, help="KubeRay's operator, built elsewhere; with kuberay")
    parser.add_argument("--kuberay-crds", type=Path, help="folder of KubeRay's CRDs; with --engine kuberay")
    parser.add_argument("--seed", type=int, help="of the moments and of their order")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="every round, as JSON")
    arguments = parser.parse_args()
    if arguments.engine == "kuberay" and not (arguments.kuberay_manager and arguments.kuberay_crds):
        parser.error("--engine kuberay needs --kuberay-manager and --kuberay-crds")
    return arguments


def _calm(victim: Victim, steps: int) -> list[tuple[int, float]]:
    started = time.monotonic()
    body = long_job("calm", victim.cluster.pod_template, steps=steps, save=20)
    body["spec"]["kubernetes"]["engine"] = victim.engine
    apply(victim.admin, victim.namespace, body)
    with victim.admin.client() as api:
        until_succeeded(Jobs(client.CustomObjectsApi(api), victim.namespace), "calm", CALM_SECONDS)
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    return curve(victim.s3, victim.namespace, "calm")


def _job(victim: Victim, name: str, steps: int, left: deque[str], calm: list[tuple[int, float]]) -> list[Round]:
    struck = replace(victim, name=name, following=Following(victim.admin, victim.namespace, name))
    rounds = Campaign(struck, steps, lambda round: print(round, flush=True)).run(left)
    same_curve(struck, calm)
    print(f"{name}: {len(rounds)} faults, every one of {steps} losses as undisturbed", flush=True)
    return rounds


def _table(rounds: list[Round]) -> str:
    """Return a Markdown table with a row per kind."""
    by_kind: defaultdict[str, list[Round]] = defaultdict(list)
    for round in rounds:
        by_kind[round.kind].append(round)
    rows = ["| fault | rounds | training broke off | seconds until it went on: median (most) | steps repeated: most |"
            " checkpoints lost |", "|---|---|---|---|---|---|"]  # fmt: skip
    for kind, some in by_kind.items():
        seconds = [round.seconds for round in some]
        lost = sum(any("was complete" in fault for fault in round.faults) for round in some)
        rows.append(f"| {kind} | {len(some)} | {sum(round.broken for round in some)} | "
                    f"{statistics.median(seconds):.0f} ({max(seconds):.0f}) | "
                    f"{max(round.repeated for round in some)} | {lost} |")  # fmt: skip
    return "\n".join(rows)


if __name__ == "__main__":
    main()
