"""Import paths of the project's modules, imports before the forks, and a fake Ray for machines without it."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("crds", "trainer", "cli", "operator")
ASK_SECONDS = 120
SAFE = (
    "torch",
    "datasets",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "finetune_api.runconfig",
)
"""Modules that do not open a GPU on import. bitsandbytes opens it; PEFT, TRL and transformers' trainer import it."""
ALL = (
    *SAFE,
    "transformers.trainer",
    "peft",
    "trl.trainer.sft_trainer",
    "finetune_trainer.launch.stage_run",
    "finetune_trainer.launch.failures",
    "finetune_trainer.generation.load",
    "finetune_trainer.plan.job",
    "finetune_trainer.stages.sft.stage",
)


def set_up(tiny: bool, with_ray: bool) -> None:
    """Make the project's modules importable from a plain checkout, silence the libraries, and hide GPUs with `--tiny`.

    Args:
        with_ray: False uses the fake even if Ray is installed.
    """
    if find_spec("finetune_trainer") is None:
        sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
    from finetune_trainer.runtime import apply_environment, quiet_environment

    os.environ |= {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})
    apply_environment(quiet_environment(accelerator=not tiny))
    if not with_ray or find_spec("ray") is None:
        sys.modules.pop("ray", None)
        sys.meta_path.insert(0, _WithoutRay())


def preload(tiny: bool) -> bool:
    """Import once what every check needs; return whether the GPU is still closed, so that forks can use it."""
    for name in ALL if tiny else SAFE:
        importlib.import_module(name)
    if tiny:
        sys.modules["torch"].set_num_threads(1)  # tiny models gain nothing from more threads
    gc.freeze()  # stages collect garbage repeatedly, which need not scan the libraries' objects
    return not opened_devices()


def has_gpu() -> bool:
    """Whether torch finds a GPU. It asks in a fork, because the call opens the GPU."""
    from gpu_checks.processes import run_alone

    answer, _ = run_alone(lambda: {"gpu": importlib.import_module("torch").cuda.is_available()}, ASK_SECONDS)
    return bool(answer and answer["gpu"])


def opened_devices() -> list[str]:
    """Return the GPU's device files that this process has open."""
    links = [_target(path) for path in Path("/proc/self/fd").iterdir()]
    return sorted({link for link in links if link.startswith(("/dev/nvidia", "/dev/dri", "/dev/kfd"))})


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed in the meantime
        return ""


class _WithoutRay(MetaPathFinder, Loader):
    """Imports `ray` and its submodules as empty modules, of which the stages use only type names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "ray" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See `importlib.abc.Loader`."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`; there is nothing to run."""


class _Empty(ModuleType):
    """A module in which every name is a class that is never raised or instantiated."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Exception,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value
