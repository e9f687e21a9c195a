"""The vLLM version that is compatible with the locked libraries. Quick to import, for `finetune doctor`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

VERSION, TORCH = "0.30", "2.13"
"""The vLLM release that is compatible with the locked libraries, and the torch version that it is built for.

vLLM pins torch exactly. Results of `uv pip compile` with this project's dependencies on 2026-11-28: vLLM 0.31 excludes
transformers 5.23, vLLM 0.33 requires torch 2.14, and TRL 1.16 supports vLLM 0.22 to 0.31.
"""
REQUIREMENT = f"vllm=={VERSION}.*"


def installed_vllm() -> str | None:
    """Return the installed version of vLLM, or None, without importing vLLM, which would initialize CUDA."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def fits_version(found: str) -> bool:
    """Return whether this project supports a version of vLLM."""
    return found == VERSION or found.startswith(f"{VERSION}.")
