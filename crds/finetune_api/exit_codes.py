"""What the exit code of a run says, to a shell and to the operator."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `finetune`; a code never changes its meaning."""

    OK = 0
    """The job is done."""
    FAILED = 1
    """A failure that a retry may mend: a lost worker, an unreachable store, an unexpected error."""
    USER_ERROR = 2
    """The job, its data or its flags are wrong; a retry fails the same way."""
    OUT_OF_MEMORY = 3
    """A device or the host ran out of memory; a retry needs a smaller job or a larger machine."""
    GATE_NOT_PASSED = 4
    """An evaluation missed the bound that its stage sets; a retry measures the same."""
    INTERRUPTED = 75
    """Stopped by a signal or by request after saving a checkpoint (`EX_TEMPFAIL`): run again with `--resume`."""
