"""Exceptions whose type determines the exit code and whether a retry may help."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.exit_codes import ExitCode
from finetune_api.problems import Problem


class UserError(Exception):
    """The job, its data or its options are wrong, so a retry fails in the same way.

    Args:
        problems: the problems, or a message.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[Problem]]]:
        """Keep the problems when the exception is pickled: Ray pickles exceptions by their arguments."""
        return type(self), (self.problems,)


class Interrupted(Exception):
    """Training was asked to stop and has saved a checkpoint."""

    exit_code = ExitCode.INTERRUPTED


class GateNotPassed(Exception):
    """An evaluation missed the gate of the job. Its metrics are in storage."""

    exit_code = ExitCode.GATE_NOT_PASSED


class TrainingFailed(Exception):
    """A stage failed for a reason other than the job, and retries did not help.

    Args:
        text: error message.
        advice: the remedy, if one is known.
        node: name of the node of a GPU fault.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, text: str = "", advice: str = "", node: str | None = None) -> None:
        super().__init__(text)
        self.advice, self.node = advice, node


class Outage(Exception):
    """A service that the job needs does not respond. The same job may succeed later."""

    exit_code = ExitCode.FAILED


class WorkersMissing(Exception):
    """Some workers did not reach a rendezvous in time, because they are slow or disconnected."""

    exit_code = ExitCode.FAILED


class OutOfMemory(TrainingFailed):
    """A device or the host ran out of memory."""

    exit_code = ExitCode.OUT_OF_MEMORY


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a run that ends with an error."""
    return getattr(error, "exit_code", ExitCode.FAILED)
