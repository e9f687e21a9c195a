"""Starts Ray without the services that a job does not use: `python -m finetune_trainer.forks.start` is `ray start`.

Workers are forked if there is a fork server. Ray's autoscaler, client server and dashboard, three processes of some
seconds of CPU time each, are omitted, and the dashboard agent is an idle one (`agent`), because no part of a job uses
them. KubeRay does: it submits its jobs to the head's dashboard and probes each node's agent. If `WATCHED_VARIABLE` is
set, the head runs Ray's own agent and the part of the dashboard that KubeRay needs (`dashboard`), and the idle agents
of the other nodes answer probes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.forks.wire import has_server

WATCHED_VARIABLE, HEAD, NODE = "FINETUNE_RAY_WATCHED", "head", "node"
"""Environment variable of `ray start` in a cluster that KubeRay manages, and its values: the kind of the node."""
_PATCHED = "patched_by_finetune"
WORKER, AGENT, DASHBOARD = (Path(__file__).with_name(f"{name}.py") for name in ("worker", "agent", "dashboard"))


def patch_ray() -> None:
    """Make this process start Ray without unused services. Ray has fields for most of them, but no options."""
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    if hasattr(RayParams, _PATCHED):
        return
    original = RayParams.__init__

    def patched(self: Any, *args: Any, **fields: Any) -> None:
        original(self, *args, **fields)
        self.no_monitor, self.include_log_monitor, self.ray_client_server_port = True, False, None
        if has_server():
            self.setup_worker_path = str(WORKER)

    setattr(RayParams, "__init__", patched)  # noqa: B010  # mypy rejects an assignment to a method
    setattr(RayParams, _PATCHED, True)
    if not _has_dashboard():
        setattr(Node, "start_api_server", _no_dashboard)  # noqa: B010
    services._build_python_executable_command_memory_profileable = _replace_programs(
        services._build_python_executable_command_memory_profileable
    )


def _has_dashboard() -> bool:
    return os.environ.get(WATCHED_VARIABLE) == HEAD


def _replace_programs(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Return Ray's function for the commands of its own programs, with our scripts for the dashboard and its agent.

    Ray appends the path and the options of its own program to the command.
    """

    def replaced(component: str, *args: Any, **options: Any) -> list[str]:
        if component == "dashboard":
            return [sys.executable, str(DASHBOARD)]
        if component == "dashboard_agent":
            return [sys.executable, "-I", "-S", str(AGENT)]
        return original(component, *args, **options)

    return replaced


def _no_dashboard(node: Any, **_: Any) -> None:
    node._webui_url = None


def main() -> None:
    """Run Ray's command line with the patches."""
    from ray.scripts.scripts import main as ray

    patch_ray()
    ray()  # type: ignore[no-untyped-call]  # Ray has no types here


if __name__ == "__main__":
    main()
