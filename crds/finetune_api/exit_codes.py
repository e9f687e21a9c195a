"""Exit codes of a run, for shells and for the operator."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `finetune`. The meaning of a code never changes."""

    OK = 0
    """The job succeeded."""
    FAILED = 1
    """A failure that a retry may resolve: a lost worker, an unreachable store, an unexpected error."""
    USER_ERROR = 2
    """The job, its data or the command-line options are invalid; a retry fails in the same way."""
    OUT_OF_MEMORY = 3
    """A device or the host ran out of memory; the job needs other settings or a larger machine."""
    GATE_NOT_PASSED = 4
    """An evaluation did not pass the gate of its stage; a retry measures the same."""
    INTERRUPTED = 75
    """Stopped by a signal or on request, after a checkpoint was saved (`EX_TEMPFAIL`): run again with `--resume`."""
