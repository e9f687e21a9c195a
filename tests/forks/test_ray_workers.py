"""Ray starts its workers as forks in jobs, and without the processes that no job needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.cluster.operator_process import eventually
from support.cluster.servers import free_port

from finetune_trainer.forks import start

PROGRAM = """
import json, os, sys, time
import psutil
from finetune_trainer.forks.client import fork_server
from finetune_trainer.forks.start import patch_ray
from finetune_trainer.runtime import apply_environment, quiet_environment

def told():
    return {"word": os.environ.get("WORD"), "parent": os.getppid(), "imported": "wave" in sys.modules}

if __name__ == "__main__":
    apply_environment(quiet_environment(accelerator=False))
    with fork_server(["numpy"], ["wave", "ray.actor"]) as server:
        patch_ray()
        import ray
        began = time.monotonic()
        ray.init(address="local", num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"WORD": "x"}},
                 object_store_memory=100 * 2**20, logging_level="ERROR")
        class Actor:
            def told(self):
                return told()
        actors = [ray.remote(Actor).options(num_cpus=1).remote() for _ in range(2)]
        answers = ray.get([actor.told.remote() for actor in actors])
        ray.kill(actors[0])
        again = ray.get(ray.remote(Actor).remote().told.remote())
        seconds = time.monotonic() - began
        here = [" ".join(item.cmdline()) for item in psutil.Process().children(recursive=True)]
        ray.shutdown()
        print(json.dumps({"server": server.pid, "answers": [*answers, again], "running": here, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, object]:
    """Return the report of a separate process that starts its own Ray."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_workers_are_forks_with_their_environment(told: dict[str, object]) -> None:
    answer = {"word": "x", "parent": told["server"], "imported": True}
    assert told["answers"] == [answer] * 3


def test_what_no_job_needs_does_not_run(told: dict[str, object]) -> None:
    running = str(told["running"])
    assert "raylet" in running and "gcs_server" in running and "agent.py" in running
    for name in ("monitor.py", "dashboard.py", "client.server", "log_monitor", "DashboardAgent"):
        assert name not in running


AGENT = Path(start.__file__).with_name("agent.py")


@pytest.mark.parametrize("watched", [True, False])
def test_the_idle_agent_answers_kuberay_s_probes(tmp_path: Path, watched: bool) -> None:
    """The agent reports the node as healthy while its raylet is alive, and ends with it."""
    port = free_port()
    options = [f"--session-dir={tmp_path}", "--node-id=n", f"--listen-port={port}"]
    environment = os.environ | ({start.WATCHED_VARIABLE: start.NODE} if watched else {})
    raylet = f"import subprocess, sys; subprocess.run({[sys.executable, '-I', '-S', str(AGENT), *options]!r})"
    with subprocess.Popen([sys.executable, "-c", raylet], env=environment) as process:
        try:
            eventually(lambda: len(list(tmp_path.glob("*_n"))) == 3)
            if watched:
                eventually(lambda: answers(port))
            else:
                assert not answers(port)
        finally:
            process.kill()
    eventually(lambda: not answers(port))


def test_kuberay_s_head_tells_the_ports_before_ray_s_agent_has_imported_anything(tmp_path: Path) -> None:
    """The raylet aborts after 15 seconds without the ports, and imports may take longer on a busy machine."""
    agent = tmp_path / "agent.py"
    agent.write_text("import json, sys, pathlib; pathlib.Path(sys.argv[0] + '.told').write_text(json.dumps(sys.argv))")
    options = [f"--session-dir={tmp_path}", "--node-id=n", "--listen-port=52365", "--grpc-port=0", "--minimal"]
    command = [sys.executable, "-I", "-S", str(AGENT), str(agent), *options]
    subprocess.run(command, env=os.environ | {start.WATCHED_VARIABLE: start.HEAD}, check=True, timeout=60)
    ports = {path.name: path.read_text() for path in tmp_path.glob("*_n")}
    given = json.loads(Path(f"{agent}.told").read_text())
    assert ports["dashboard_agent_listen_port_n"] == "52365" and int(ports["metrics_agent_port_n"]) > 0
    assert f"--grpc-port={ports['metrics_agent_port_n']}" in given and "--minimal" in given


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
