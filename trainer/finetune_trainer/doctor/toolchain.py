"""Checks of the compiler and the libraries that kernels need at run time. Pure."""

from __future__ import annotations

from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, Scope, State
from finetune_trainer.doctor.needs import Needs

LIBCUDA = "libcuda.so.1"
INSTALL = (
    "Install gcc, libc6-dev and Python's headers in the image (apt-get install gcc libc6-dev python3-dev), or use the "
    "project's trainer image"
)


def compiler(facts: Facts, needs: Needs) -> Finding:
    """Check that Triton can compile its kernel launcher, as it does at the first kernel of an uncached process."""
    tools, name = facts.toolchain, "C compiler and Python headers"
    needed = "gcc or clang, libc and Python headers: Triton compiles its kernel launcher at run time"
    if not needs.gpus or tools.triton is None:
        return Finding(name, State.NOT_NEEDED, tools.compiler or "none", "training on GPUs", scope=Scope.IMAGE)
    if not tools.error:
        return Finding(name, State.OK, f"{tools.compiler}, compiles Triton {tools.triton}'s launcher", needed,
                       scope=Scope.IMAGE)  # fmt: skip
    found = f"{tools.compiler or 'no compiler on PATH'} ({tools.error})"
    state = State.MISSING if needs.compiled else State.WARNING
    return Finding(name, state, found, needed, INSTALL, scope=Scope.IMAGE)


def libcuda(facts: Facts, needs: Needs) -> Finding:
    """Check that Triton finds the driver's library, with which it links its launcher, by ldconfig."""
    tools, name, needed = facts.toolchain, LIBCUDA, "the driver's library, where ldconfig or LD_LIBRARY_PATH finds it"
    if not needs.gpus or tools.triton is None:
        return Finding(name, State.NOT_NEEDED, "not checked", "training on GPUs")
    if not tools.libcuda_error:
        return Finding(name, State.OK, "found", needed)
    remedy = "Run the container by the NVIDIA container runtime, or set TRITON_LIBCUDA_PATH to the library's directory"
    state = State.MISSING if needs.compiled else State.WARNING
    return Finding(name, state, tools.libcuda_error, needed, remedy)
