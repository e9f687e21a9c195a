"""Checks of the machine and of the libraries on it, without training."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpu_checks.environment import ROOT, opened_devices
from gpu_checks.models import fields_of, make_tokenizer, text_of
from gpu_checks.processes import describe, run_alone
from gpu_checks.record import NEEDS_GPU, Json, Options, Skipped, require
from gpu_checks.stage_runs import join_group

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "ray", "vllm")
LIGHT = (
    "finetune_cli.main",
    "finetune_trainer.doctor.gather",
    "finetune_trainer.launch.worker",
    "finetune_trainer.plan.vllm_version",
    "finetune_trainer.plan.job",
    "finetune_trainer.launch.stage_run",
)
"""Modules of ours that the driver, the doctor and the workers import first."""
LIBRARIES = ("peft", "trl.trainer.sft_trainer", "deepspeed", "bitsandbytes")


def versions(options: Options) -> Json:
    """Return the versions, those that differ from the lock file, and the device."""
    from finetune_trainer.doctor.gather import driver_facts
    from finetune_trainer.plan.devices import local_device, peak_flops

    found = {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    locked = {one["name"]: one.get("version") for one in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    differs = {name: [one, locked[name]] for name, one in found.items() if one and locked.get(name, one) != one}
    device = local_device()
    told = {"device": device.name, "memory_gib": device.memory_bytes / 2**30, "packages": found, "not_locked": differs}
    if options.accelerator:
        told |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": driver_facts().version,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
        require(peak_flops(device.name, torch.bfloat16) is not None, f"no peak is known of {device.name}", told)
    return told


def _version(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def ceiling(options: Options) -> Json:
    """Check a large bfloat16 matrix product on random numbers: its result and its TFLOP/s."""
    from finetune_trainer.plan.devices import local_device, peak_flops

    size, repeats = (256, 5) if options.tiny else (8192, 20)
    left, right = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    product = left @ right
    expected = left[:64].float() @ right.float()
    error = ((product[:64].float() - expected).norm() / expected.norm()).item()
    seconds = [_timed(options, lambda: torch.matmul(left, right)) for _ in range(repeats)]
    reached = 2 * size**3 / statistics.median(seconds)
    peak = peak_flops(local_device().name, torch.bfloat16) if options.accelerator else None
    values: Json = {"tflops": reached / 1e12, "peak_tflops": peak and peak / 1e12, "error": error}
    require(error < 1e-2, f"the product is wrong by {error:.2g}", values)
    require(peak is None or reached > 0.4 * peak, "less than 0.4 of the data sheet's peak", values)
    return values


def _timed(options: Options, work: Callable[[], object]) -> float:
    """Return the seconds of one call, including the device's work."""
    started = time.perf_counter()
    work()
    if options.accelerator:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def imports(options: Options) -> Json:
    """Check which imports open the GPU. Ours must not, because a process that has opened it can't be forked."""
    openers: dict[str, list[str]] = {}
    for name in (*LIGHT, *LIBRARIES):
        before = opened_devices()
        try:
            importlib.import_module(name)
        except ImportError as error:
            openers[name] = [f"not importable: {error}"[:200]]
            continue
        if new := sorted(set(opened_devices()) - set(before)):
            openers[name] = new
    values: Json = {"openers": openers, "initialized": torch.cuda.is_initialized()}
    require("finetune_cli.main" not in openers, "the command line opens the GPU", values)
    require("finetune_trainer.doctor.gather" not in openers, "the doctor's process opens the GPU", values)
    if options.tiny:
        require(not any(map(_is_device, openers.values())), "opened a GPU", values)
        raise Skipped(NEEDS_GPU, values)
    return values


def _is_device(found: list[str]) -> bool:
    return any(one.startswith("/dev") for one in found)


def compiler(options: Options) -> Json:
    """Check Triton's launcher and TRL's loss with and without a C compiler: the error must be classified correctly."""
    from finetune_api.device_faults import FaultKind

    if shutil.which("gcc") is None:
        raise Skipped("needs gcc on PATH")
    with_gcc, _ = run_alone(lambda: _loss_and_launcher(options), 120)
    with _no_compiler(options):
        without, tail = run_alone(lambda: _loss_and_launcher(options), 120)
    values: Json = {"with": with_gcc, "without": without}
    require(bool(with_gcc) and not with_gcc["launcher"] and not with_gcc["loss"], f"with gcc: {tail}", values)
    require(bool(without) and "C compiler" in without["launcher"], "Triton compiled without a compiler", values)
    if options.accelerator:
        kind = (without["loss"] or {}).get("kind")
        require(kind == FaultKind.TOOLCHAIN.value, f"TRL's loss without gcc has the class {kind}", values)
    return values


def _loss_and_launcher(options: Options) -> Json:
    """Return the launcher's error, empty if it compiles, and the loss's error, None if it works."""
    from finetune_trainer.doctor.programs import LAUNCHER, run_program

    launcher = run_program(LAUNCHER).get("error")
    try:
        return {"launcher": launcher, "loss": None, "value": _trl_loss(options)}
    except Exception as error:
        return {"launcher": launcher, "loss": describe(error)}


def _trl_loss(options: Options) -> float:
    """Compute the loss of TRL's trainers, forward and backward: a Triton kernel on CUDA."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    fields = fields_of(options, "0.6B") | ({} if options.tiny else {"num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(options.device)
    add_fused_lm_head(model)
    ids = make_tokenizer(options)(text_of(options, 128), return_tensors="pt")["input_ids"].to(options.device)
    loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    loss.backward()
    return float(loss)


@contextmanager
def _no_compiler(options: Options) -> Iterator[None]:
    """Empty PATH and Triton's cache inside the context."""
    empty = options.work / "no-compiler"
    empty.mkdir(exist_ok=True)
    changed = {"PATH": str(empty), "TRITON_CACHE_DIR": str(empty / "cache")}
    kept = {name: os.environ.get(name) for name in (*changed, "CC")}
    os.environ |= changed
    os.environ.pop("CC", None)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}


def collectives(options: Options) -> Json:
    """Check an all-reduce in a group of one: its bandwidth, the network NCCL would use, and torch's record of it."""
    from finetune_trainer.launch.flight_recorder import answer_questions, last_collectives

    log, recorder = options.work / "nccl.log", options.work / "recorder.sock"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
    join_group(options)
    count = 1 << (10 if options.tiny else 28)
    numbers = torch.ones(count, device=options.device)
    torch.distributed.all_reduce(numbers)
    seconds = statistics.median(_timed(options, lambda: torch.distributed.all_reduce(numbers)) for _ in range(5))
    values: Json = {"gib_per_second": 4 * count / seconds / 2**30, "sum": numbers.sum().item() / count}
    require(values["sum"] == 1.0, "the sum over one worker is not its own", values)
    answer_questions(recorder)
    values["recorded"] = [one.words for one in last_collectives(recorder)]
    wanted = "gloo:all_reduce" if options.tiny else "nccl:all_reduce"
    require(any(words.startswith(wanted) for words in values["recorded"]), "torch has no record of it", values)
    values["networks"] = networks(log.read_text() if log.exists() else "")
    if options.tiny:
        raise Skipped(f"NCCL {NEEDS_GPU}; gloo has reduced", values)
    require(bool(values["networks"]), "NCCL's log names no network", values)
    return values


def networks(log: str) -> list[str]:
    """Return the networks that NCCL's log says it uses, such as IB or Socket."""
    return sorted(set(re.findall(r"(?:Using network |NET/)(\w+)", log)) - {"Plugin"})


def out_of_memory(options: Options) -> Json:
    """Check how the driver classifies an allocation that can't succeed, and an index out of range."""
    from finetune_api.device_faults import FaultKind

    wanted = FaultKind.HOST_MEMORY if options.tiny else FaultKind.DEVICE_MEMORY
    full, tail = run_alone(lambda: _classified(lambda: _allocate(options)), 60)
    values: Json = {"full": full}
    require(bool(full), f"the process died: {tail}", values)
    assert full is not None
    require(full["kind"] == wanted.value, f"its class is {full['kind']}", values)
    require(full["failure"] == "out of memory" and not full["retryable"], f"the driver says {full['failure']}", values)
    if options.accelerator:
        values["assert"], tail = run_alone(lambda: _classified(_index_out_of_range), 60)
        kind = (values["assert"] or {}).get("kind")
        require(kind == FaultKind.DEVICE_ASSERT.value, f"an index out of range: {kind}, {tail}", values)
    return values


def _classified(work: Callable[[], object]) -> Json:
    """Return the error of a call as the driver classifies it."""
    from finetune_trainer.launch.failures import classify

    try:
        work()
    except Exception as error:
        failure = classify(error)  # type: ignore[arg-type]
        told = {"failure": failure.kind.value, "retryable": failure.retryable, "advice": failure.advice}
        return describe(error) | told
    return {"class": None, "kind": None, "failure": None, "retryable": None}


def _allocate(options: Options) -> None:
    """Allocate a tenth of the GPU when a fiftieth is allowed; on the host, more than any machine has."""
    if options.tiny:
        torch.empty(1 << 60, dtype=torch.uint8)
        return
    torch.cuda.set_per_process_memory_fraction(0.02)
    torch.empty(torch.cuda.get_device_properties(0).total_memory // 10, dtype=torch.uint8, device="cuda")


def _index_out_of_range() -> None:
    table = torch.zeros(4, 8, device="cuda")
    torch.nn.functional.embedding(torch.tensor([4], device="cuda"), table)
    torch.cuda.synchronize()


def models(options: Options, *shapes: str) -> Json:
    """Write the models of random weights that the other checks train."""
    from gpu_checks.models import saved_model

    made: Json = {}
    for shape in shapes:
        started = time.perf_counter()
        files = Path(saved_model(options, shape)).glob("*.safetensors")
        made[shape] = {"gib": sum(one.stat().st_size for one in files) / 2**30, "s": time.perf_counter() - started}
    return made
