"""A stand-in for NVIDIA's libraries, with which torch itself reports a driver that is too old."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NVML = """
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
"""
CUDA = """
#include <stdio.h>
int cuDriverGetVersion(int *version) {
    FILE *file = fopen("MARK", "a");
    if (file) { fputs("asked", file); fclose(file); }
    *version = VERSION;
    return 0;
}
int cuInit(unsigned flags) { return 0; }
"""


def build(directory: Path, version: int = 12040) -> dict[str, str]:
    """Build libraries with one GPU and a CUDA that is too old; return the environment that loads them.

    A file `asked` in the directory shows whether a library has called the driver.
    """
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here to build the stand-in for NVIDIA's libraries")
    source = CUDA.replace("MARK", str(directory / "asked")).replace("VERSION", str(version))
    for name, text in (("libnvidia-ml.so.1", NVML), ("libcuda.so.1", source)):
        file = directory / f"{name}.c"
        file.write_text(text)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(directory / name), str(file)], check=True)
    return {"LD_LIBRARY_PATH": str(directory)}
