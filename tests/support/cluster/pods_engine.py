"""A third engine for tests: an attempt is one plain Pod that the operator creates.

Run as a program, this module registers the engine and starts the operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_api.job import KIND
from finetune_api.problems import Problem
from finetune_operator import main as operator
from finetune_operator.core.snapshot import (
    EngineStatus,
    PodNode,
    RunState,
    RunView,
    controller_of,
    owner_uid,
    run_view,
)
from finetune_operator.engines import ENGINES, Engine
from finetune_operator.render.pods import NODE_COMMAND, pod_template
from finetune_operator.render.run import Run

Json = dict[str, Any]
NAME = "pods"
_STATES = {"Running": RunState.RUNNING, "Succeeded": RunState.SUCCEEDED, "Failed": RunState.FAILED}


def render(run: Run) -> Json:
    """Return the only pod of an attempt."""
    template = pod_template(run, NODE_COMMAND)
    spec = template["spec"] | {"hostname": f"{run.name}-0", "subdomain": run.support}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": run.metadata(run.name), "spec": spec}


def observe(body: Json) -> RunView | None:
    """Return the state of an attempt, or None for pods of other engines, which have an owner."""
    metadata, status = body["metadata"], body.get("status") or {}
    if controller_of(metadata).get("kind") != KIND:
        return None
    state = _STATES.get(status.get("phase", ""), RunState.PENDING)
    said = EngineStatus(status.get("reason", ""), status.get("message", ""), _ended(status))
    return run_view(body, NAME, state, said, pods_owner=owner_uid(metadata))


def _ended(status: Json) -> str | None:
    states = (item.get("state") or {} for item in status.get("containerStatuses") or [])
    return next((state["terminated"].get("finishedAt") for state in states if "terminated" in state), None)


def locate(metadata: Json) -> PodNode | None:
    """Return node 0, which is the only one."""
    return PodNode(0, owner_uid(metadata)) if controller_of(metadata).get("kind") == KIND else None


def refusals(spec: Json) -> Iterable[Problem]:
    """Yield an error for a number of nodes other than 1."""
    nodes = spec.get("resources", {}).get("nodes", 1)
    if nodes != 1:
        yield Problem("resources.nodes", f"is {nodes}: the engine {NAME} runs one node")


ENGINE = Engine(
    name=NAME,
    kind="Pod",
    plural="pods",
    group="",
    version="v1",
    render=render,
    observe=observe,
    locate=locate,
    refusals=refusals,
)

if __name__ == "__main__":
    ENGINES[NAME] = ENGINE
    operator.main()
