"""Ray with what a job needs of it: `python -m finetune_trainer.forks.start` is `ray start`, put right like that.

Its workers are forked where a server for that is there. Its autoscaler, its client's server and its dashboard, three
processes of some seconds of CPU each, are left out, and the dashboard's agent is an idle one (`agent`): nothing of a
job asks them. KubeRay does: it submits its jobs to the head's dashboard, and asks each node's agent whether the node is
well. Where `WATCHED_VARIABLE` is set, a head has Ray's own agent, and of the dashboard what KubeRay needs
(`dashboard`); the other nodes' idle agents answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.forks.wire import SOCKET_VARIABLE

WATCHED_VARIABLE, HEAD, NODE = "FINETUNE_RAY_WATCHED", "head", "node"
"""Environment variable of a `ray start` that KubeRay watches, with what it starts there."""
WORKER, AGENT, DASHBOARD = (Path(__file__).with_name(f"{name}.py") for name in ("worker", "agent", "dashboard"))


def lean() -> None:
    """Have the Ray that this process starts be like that. Ray's parameters have fields for most of it, its commands
    have no options."""
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    if hasattr(RayParams, "lean"):
        return
    plain = RayParams.__init__

    def ours(self: Any, *args: Any, **fields: Any) -> None:
        plain(self, *args, **fields)
        self.no_monitor, self.include_log_monitor, self.ray_client_server_port = True, False, None
        if os.environ.get(SOCKET_VARIABLE):
            self.setup_worker_path = str(WORKER)

    RayParams.__init__, RayParams.lean = ours, True
    if not _has_dashboard():
        Node.start_api_server = _no_dashboard
    services._build_python_executable_command_memory_profileable = _python(
        services._build_python_executable_command_memory_profileable
    )


def _has_dashboard() -> bool:
    return os.environ.get(WATCHED_VARIABLE) == HEAD


def _python(plain: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Return how Ray runs its own programs, with ours in place of some: these are given Ray's path and options."""

    def ours(component: str, *args: Any, **options: Any) -> list[str]:
        if component == "dashboard":
            return [sys.executable, str(DASHBOARD)]
        if component == "dashboard_agent":
            return [sys.executable, "-I", "-S", str(AGENT)]
        return plain(component, *args, **options)

    return ours


def _no_dashboard(node: Any, **_: Any) -> None:
    node._webui_url = None


def main() -> None:
    """Ray's own command, with that."""
    from ray.scripts.scripts import main as ray

    lean()
    ray()


if __name__ == "__main__":
    main()
