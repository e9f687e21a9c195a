"""Reads torch's build and GPUs, and runs a kernel on each: `python torch_probe.py PACKAGE...` prints one line of JSON.

It runs as a script, by path, because a process that has opened a GPU can't be forked and keeps some hundred megabytes
of its memory. The packages are optional ones, whose import is tried, because it may fail although they are installed.
"""

import importlib
import json
import sys
from typing import Any


def main(packages: list[str]) -> None:
    """Print torch's build, each GPU and all errors."""
    found: dict[str, Any] = {"error": "", "gpus": [], "nccl": None, "architectures": [], "imports": {}}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        found["error"] = _short(error)
        print(json.dumps(found))
        return
    found["architectures"] = (torch._C._cuda_getArchFlags() or "").split() if torch.version.cuda else []
    found["nccl"] = _nccl(torch)
    try:
        torch.cuda.init()
        found["gpus"] = [_properties(torch, number) for number in range(torch.cuda.device_count())]
        for number in range(len(found["gpus"])):
            _compute(torch, number)
    except Exception as error:
        found["error"] = _short(error)
    for name in packages:
        found["imports"][name] = _import_error(name)
    print(json.dumps(found))


def _nccl(torch: Any) -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:
        return None  # a torch without NCCL has no function for its version


def _properties(torch: Any, number: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(number)
    return {"name": found.name, "capability": [found.major, found.minor], "memory": found.total_memory}


def _compute(torch: Any, number: int) -> None:
    """Compute a sum on a GPU and check it, which fails on a broken GPU or one that torch does not support."""
    if int((torch.ones(8, device=f"cuda:{number}") + 1).sum().item()) != 16:
        raise RuntimeError(f"GPU {number} computes wrong results")


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:
        return _short(error)
    return ""


def _short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
