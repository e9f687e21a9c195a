"""Build and load Triton's launcher as on a GPU node: `python triton_launcher.py DIRECTORY`.

A stand-in replaces the driver's library, which a machine without a GPU lacks. It has the functions that the launcher
calls. The program runs in the image's root and imports nothing of the project.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path


def main(directory: Path) -> None:
    """Compile and load the launcher; raise Triton's error where the image cannot compile."""
    os.environ |= {"TRITON_CACHE_DIR": str(directory / "cache"), "TRITON_LIBCUDA_PATH": str(directory)}
    from triton.backends.nvidia import driver
    from triton.runtime.build import _build

    library = _build(
        "cuda_utils", str(Path(driver.dirname, "driver.c")), str(directory), [], driver.include_dirs, [], []
    )
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    called = [line.split()[-1] for line in names.splitlines() if line.split()[-1].startswith("cu")]
    source = directory / "stand_in.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in called))
    stand_in = str(directory / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stand_in, str(source)], check=True)
    ctypes.CDLL(stand_in, ctypes.RTLD_GLOBAL)  # on a GPU node, ldconfig makes the driver's library known to the loader
    utils = driver.CudaUtils()
    print(len(called), callable(utils.launch))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
