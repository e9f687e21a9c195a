"""Facts of a machine are read from kernel files and from programs that query Triton and torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.doctor import fake_driver

from finetune_trainer.doctor.facts import Driver, Fabric, Package
from finetune_trainer.doctor.gather import driver_facts, fabric_facts, gather, hub_facts
from finetune_trainer.doctor.programs import LAUNCHER, TORCH, run_program

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"
    "GCC version:  gcc version 12.2.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"


def machine(root: Path, **files: str) -> Path:
    """Return a root with files of the kernel; `__` in a name means a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(("text", "version", "is_open"), [(CLOSED, "535.129.03", False), (OPEN, "580.65.06", True)])
def test_the_driver_by_the_kernel_s_words(tmp_path: Path, text: str, version: str, is_open: bool) -> None:
    root = machine(tmp_path, proc__driver__nvidia__version=text, dev__nvidia0="", dev__nvidia1="", dev__nvidiactl="")
    assert driver_facts(root) == Driver(version, is_open, devices=2)


def test_gpus_on_the_bus_without_a_driver(tmp_path: Path) -> None:
    gpu, audio = ("sys__bus__pci__devices__0000:3b:00.0", "sys__bus__pci__devices__0000:3b:00.1")
    files = {f"{gpu}__vendor": "0x10de\n", f"{gpu}__class": "0x030200\n"}
    files |= {f"{audio}__vendor": "0x10de\n", f"{audio}__class": "0x040300\n"}
    assert driver_facts(machine(tmp_path, **files)) == Driver(on_bus=1)


def test_nothing_of_nvidia_s(tmp_path: Path) -> None:
    assert driver_facts(tmp_path) == Driver()


@pytest.mark.parametrize(("effective", "locks"), [("0000000000000000", False), ("00000000a80465fb", True)])
def test_a_capability_counts_where_it_is_in_effect(tmp_path: Path, effective: str, locks: bool) -> None:
    """Kubernetes adds capabilities to a container of a non-root user only in the bounding set."""
    status = f"CapPrm:\t{effective}\nCapEff:\t{effective}\nCapBnd:\t00000000a80465fb\n"
    root = machine(tmp_path, proc__self__status=status, dev__infiniband__uverbs0="", sys__class__infiniband__mlx5_0="")
    (root / "sys/module/nvidia_peermem").mkdir(parents=True)
    facts = fabric_facts(root)
    assert facts == Fabric(("uverbs0",), ("mlx5_0",), facts.locked_bytes, locks, True)


def test_triton_s_launcher_compiles_here_and_not_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The test runs Triton's build function on Triton's source."""
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    if shutil.which("gcc") is not None:
        answer = run_program(LAUNCHER)
        assert (answer["compiler"], answer["error"]) == (shutil.which("gcc"), "")
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = run_program(LAUNCHER)
    assert (answer["compiler"], answer["error"]) == (None, "Failed to find C compiler.")


def test_headers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler without Python headers, as in an image with only gcc, reports them on its standard error."""
    pytest.importorskip("triton")
    compiler = tmp_path / "gcc"
    compiler.write_text(
        "#!/bin/sh\necho 'cuda_utils.c:9:10: fatal error: Python.h: No such file or directory' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert run_program(LAUNCHER)["error"] == "cuda_utils.c:9:10: fatal error: Python.h: No such file or directory"


def test_the_driver_s_library_is_looked_for_as_triton_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "libcuda.so.1").touch()
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    assert run_program(LAUNCHER)["libcuda_error"] == ""


def test_torch_on_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message is torch's own, with libraries that stand in for NVIDIA's."""
    for name, value in fake_driver.build(tmp_path).items():
        monkeypatch.setenv(name, value)
    answer = run_program(TORCH, "no_such_package", "json")
    assert answer["error"].startswith("RuntimeError: The NVIDIA driver on your system is too old (found version 12040)")
    assert (answer["gpus"], answer["imports"]["json"]) == ([], "")
    assert answer["imports"]["no_such_package"].startswith("ModuleNotFoundError")
    assert (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [("import os; os.abort()", "ended with exit code -6"), ("import sys; sys.exit('driver?')", "exit code 1: driver?")],
)
def test_a_program_that_dies_is_an_answer(tmp_path: Path, program: str, says: str) -> None:
    """A broken driver may end a process by a signal."""
    path = tmp_path / "program.py"
    path.write_text(program)
    assert says in run_program(path)["error"]


def test_all_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One package is installed but does not load, such as a flash-attn that was built for another torch."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    facts = gather(tmp_path / "not" / "yet", ask_hub=False)
    assert facts.torch.version and facts.torch.version.startswith("2.") and not facts.hub.asked
    assert facts.host.cache_free_bytes and facts.host.memory_bytes and facts.host.open_files
    assert facts.packages["flash_attn"] == Package("of unknown version", "ImportError: undefined symbol: _ZN3c104cuda")
    assert facts.packages["bitsandbytes"].version[0].isdecimal()
    if facts.torch.cuda:
        assert facts.torch.architectures and facts.torch.nccl
    assert facts.bitsandbytes_cudas and all(len(version) == 3 for version in facts.bitsandbytes_cudas)


def test_the_hub_is_not_asked_where_the_environment_says_offline() -> None:
    """huggingface_hub reads the variable at import, so the test needs it in the environment of the test run."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is not set here")
    assert hub_facts().offline and not hub_facts().asked


@pytest.mark.parametrize(("answer", "error"), [("HTTP/1.1 403 Forbidden\r\n\r\n", ""), ("", "does not answer")])
def test_a_hub_that_refuses_is_reachable(answer: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import threading

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(answer.encode())
            connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        found = hub_facts()
        thread.join(5)
    assert found.asked and not found.offline and (error in found.error if error else found.error == "")
