"""Compiles Triton's kernel launcher by Triton's build function: `python launcher.py` prints one line of JSON.

It runs as a script, by path, so that the compiler's messages can be read from its standard error. Triton links the
launcher with the driver's library; this script only searches for it, because machines without GPUs have none.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Print Triton's version, its compiler and its errors; return 1 if the launcher does not compile."""
    found: dict[str, str | None] = {"triton": None, "compiler": _compiler(), "error": "", "libcuda_error": ""}
    try:
        import triton  # type: ignore[import-untyped]
        from triton.backends.nvidia import driver  # type: ignore[import-untyped]
        from triton.runtime.build import _build  # type: ignore[import-untyped]
    except ImportError:
        print(json.dumps(found))
        return 0
    found["triton"] = triton.__version__
    try:
        with tempfile.TemporaryDirectory() as directory:
            source = Path(driver.dirname, "driver.c")
            _build("cuda_utils", str(source), directory, [], driver.include_dirs, [], [])
    except Exception as error:
        found["error"] = _short(error)
    try:
        driver.libcuda_dirs()
    except Exception as error:
        found["libcuda_error"] = _short(error)
    print(json.dumps(found))
    return int(bool(found["error"]))


def _compiler() -> str | None:
    """Return the compiler that `triton.runtime.build` uses."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _short(error: Exception) -> str:
    message = (
        str(error).split("Please specify")[0] if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    )
    return " ".join(message.split())[:300]


if __name__ == "__main__":
    sys.exit(main())
