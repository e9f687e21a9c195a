"""The fork server forks processes with imported libraries: what they inherit, and how they end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.doctor import fake_driver

from finetune_api.runconfig import RunConfig
from finetune_trainer.forks import client, wire
from finetune_trainer.forks.server import opened_gpu
from finetune_trainer.forks.start import WORKER
from finetune_trainer.launch import fork_imports

TELL = """
import json, os, random, sys
import numpy
print(json.dumps({
    "argv": sys.argv, "name": __name__, "directory": os.getcwd(), "word": os.environ.get("WORD"),
    "secret": os.environ.get("SECRET"), "chance": [random.random(), numpy.random.rand()],
    "imported": "json.tool" in sys.modules, "session": os.getsid(0) == os.getpid(),
}))
"""

CONTEXT = "--serialized-runtime-env-context="
PROGRAM = "import sys; from finetune_trainer.forks.client import run_fork; sys.exit(run_fork(sys.argv[1:]))"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server that has imported a module that a new Python process has not."""
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    monkeypatch.setenv("SECRET", "the server's own")
    with client.fork_server(["json.tool", "numpy", "no_such_module"], ["wave"]) as started:
        monkeypatch.delenv("SECRET")
        yield started


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def asked(path: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a fork from a separate process, with its streams passed on unchanged."""
    program = (
        f"import sys; from finetune_trainer.forks.client import run_fork; sys.exit(run_fork({[path, *arguments]}))"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_a_fork_has_the_modules_and_nothing_else_of_the_server(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = script(tmp_path, TELL)
    first, second = (json.loads(asked(path, "--flag", WORD=word).stdout) for word in ("one", "two"))
    assert first["imported"] and first["name"] == "__main__" and first["argv"] == [path, "--flag"]
    assert first["session"] and first["directory"] == os.getcwd()
    assert (first["word"], second["word"], first["secret"]) == ("one", "two", None)
    assert not set(first["chance"]) & set(second["chance"]), "both drew the same numbers"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import sys; sys.exit(75)", 75),
        ("raise RuntimeError('it broke')", 1),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import sys; sys.exit('a message')", 1),
        ("", 0),
    ],
)
def test_how_a_fork_ends_is_told(server: subprocess.Popen[bytes], tmp_path: Path, text: str, code: int) -> None:
    done = asked(script(tmp_path, text))
    assert done.returncode == code
    assert ("it broke" in done.stderr) == ("it broke" in text)


def test_what_is_registered_for_the_end_runs(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    done = asked(script(tmp_path, "import atexit; atexit.register(print, 'bye'); print('hello')"))
    assert done.stdout.split() == ["hello", "bye"]


def test_a_signal_is_passed_on(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("ready", flush=True)
        time.sleep(60)
        """,
    )
    with subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None and asker.stdout.readline() == "ready\n"
        asker.send_signal(signal.SIGTERM)
        assert asker.wait(20) == 75


def test_a_server_that_dies_is_told_from_a_process_that_does(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = script(tmp_path, "import time; print('ready', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None and asker.stdout.readline() == "ready\n"
        server.kill()
        assert asker.wait(20) == 137
    server.wait()
    assert client.run_fork([path]) is None and wire.connect() is None


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_fork_ends_with_the_server(server: subprocess.Popen[bytes], tmp_path: Path, end: str) -> None:
    """The workers of a killed driver must not continue to train while those of the next driver run."""
    path = script(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", PROGRAM, path], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None and server.stdin is not None
        fork = psutil.Process(int(asker.stdout.readline()))
        server.kill() if end == "kill" else server.stdin.close()
        _, alive = psutil.wait_procs([fork], timeout=5)
        assert not alive
        assert asker.wait(20) == 137


def test_a_worker_of_ray_gets_its_own_arguments_and_environment(
    server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Ray's two options for its own script may be at any position."""
    path = tmp_path / "default_worker.py"
    path.write_text(TELL)
    context = json.dumps({"env_vars": {"WORD": "of the runtime environment"}, "command_prefix": []})
    options = ["--node-ip-address=1.2.3.4", "--language=PYTHON", f"{CONTEXT}{context}", "--last"]
    command = [sys.executable, str(WORKER), str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = json.loads(done.stdout)
    assert told["argv"] == [str(path), "--node-ip-address=1.2.3.4", "--last"]
    assert told["imported"] and told["word"] == "of the runtime environment"


def test_what_needs_ray_is_imported_for_the_first_worker(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A worker of another raylet is rejected, because the imported library has already read its session."""
    path = script(tmp_path, "import os, sys; print('wave' in sys.modules, os.environ.get('RAY_JOB_ID'))")
    assert asked(path).stdout.split() == ["False", "None"]
    ours, others = ({"RAY_JOB_ID": "01", "RAY_RAYLET_PID": pid} for pid in ("7", "8"))
    assert asked(path, **ours).stdout.split() == ["True", "01"]
    assert asked(path, **others).stdout == ""
    assert asked(path, **ours).stdout.split() == ["True", "01"]


def test_without_a_server_ray_starts_its_workers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's script rejects arguments that Ray never passes, with its own message."""
    monkeypatch.delenv(wire.SOCKET_VARIABLE, raising=False)
    done = subprocess.run([sys.executable, str(WORKER), "--language=NONE"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "setup_worker.py" in done.stderr


def test_a_gpu_that_is_open_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands in for the device of a GPU."""
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr("finetune_trainer.forks.server.GPU_DEVICES", str(tmp_path / "nvidia"))
    assert not opened_gpu()
    with device.open():
        assert opened_gpu()
    assert not opened_gpu()


def test_a_server_whose_libraries_open_a_gpu_serves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opens_a_gpu.py").write_text(
        f"import sys\nsys.modules['__main__'].GPU_DEVICES = {str(tmp_path)!r}\nheld = open(__file__)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    with client.fork_server(["opens_a_gpu"], []) as server:
        assert server.wait(30) == 1
        assert client.run_fork(["x.py"]) is None


@pytest.mark.parametrize("visible", [None, "", "1,0"], ids=["not set", "none", "two"])
def test_gpus_are_hidden_from_what_the_server_imports_and_not_from_a_fork(
    visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "looks_for_gpus.py").write_text("import os\nSEEN = os.environ.get('CUDA_VISIBLE_DEVICES')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    path = script(
        tmp_path,
        "import json, os, looks_for_gpus\n"
        "print(json.dumps([looks_for_gpus.SEEN, os.environ.get('CUDA_VISIBLE_DEVICES')]))",
    )
    with client.fork_server(["looks_for_gpus"], []):
        assert json.loads(asked(path).stdout) == ["", visible]


def test_bitsandbytes_asks_no_driver_where_the_server_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU machine, for which libraries stand in, an import of bitsandbytes opens the GPU by default."""
    for name, value in fake_driver.build(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    path = script(tmp_path, "import sys, torch; print('bitsandbytes' in sys.modules, torch.cuda.is_initialized())")
    with client.fork_server(["bitsandbytes"], []):
        assert asked(path).stdout.split() == ["True", "False"]
        assert not (tmp_path / "asked").exists()


def config(gpus: int | None) -> RunConfig:
    data = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}
    resources = {} if gpus is None else {"gpusPerNode": gpus}
    spec = {
        "model": {"path": "/m"},
        "stages": [{"sft": {"data": data}}],
        "storage": {"path": "r"},
        "resources": resources,
    }
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}, "spec": spec}
    return RunConfig.model_validate({"job": job, "root": "/r", "baseDir": "/", "cacheDir": "/c"})


@pytest.mark.parametrize(
    ("gpus", "devices", "visible", "uses"),
    [
        (1, (), None, True),
        (0, ("nvidia0",), None, False),
        (None, (), None, False),
        (None, ("nvidiactl", "nvidia-uvm"), None, False),
        (None, ("nvidia0",), None, True),
        (None, ("dxg",), None, True),
        (None, ("nvidia0",), "", False),
        (None, ("nvidia0",), "0", True),
    ],
)
def test_jobs_on_gpus_do_without_the_server(
    gpus: int | None, devices: tuple[str, ...], visible: str | None, uses: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fork_imports, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in devices:
        (tmp_path / name).touch()
    assert fork_imports.uses_gpus(config(gpus)) is uses


def test_why_there_is_no_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")
    said: list[str] = []
    with fork_imports.forks(config(8), said.append):
        assert client.run_fork(["x.py"]) is None
    assert len(said) == 1 and "without the fork server" in said[0]


def test_the_environment_switches_the_server_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server starts, and processes that inherit the value `0` do not use it as the path of a socket."""
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "0")
    said: list[str] = []
    with fork_imports.forks(config(0), said.append) as server:
        assert server is None and os.environ[wire.SOCKET_VARIABLE] == "0"
        assert not wire.has_server() and wire.connect() is None
        assert client.run_fork(["x.py"]) is None
    assert said == ["processes start without the fork server: FINETUNE_FORK_SERVER=0"]


def test_a_server_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """The server also ends when its parent is killed."""
    program = """
import sys, time
from finetune_trainer.forks.client import fork_server
with fork_server(["json.tool"], []) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # it has already ended
    try:
        ended, _, _ = select.select([descriptor], [], [], 30)
        assert ended, "the server lives on"
    finally:
        os.close(descriptor)
