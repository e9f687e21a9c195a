"""Which vLLM fits the locked libraries. Imports nothing heavy: `finetune doctor` reads it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

VERSION, TORCH = "0.30", "2.13"
"""The vLLM release that can be installed beside the locked libraries, and the torch that it is built for.

vLLM pins torch exactly. As `uv pip compile` resolved it with this project's dependencies on 2026-11-28: 0.31 refuses
transformers 5.23, 0.33 needs torch 2.14, and TRL 1.16 takes vLLM 0.22 to 0.31.
"""
REQUIREMENT = f"vllm=={VERSION}.*"


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, or None. It is not imported: that opens the GPUs."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def fits_version(found: str) -> bool:
    """Return whether a version of vLLM is the one that this project supports."""
    return found == VERSION or found.startswith(f"{VERSION}.")
