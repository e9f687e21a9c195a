"""Errors whose type says what to do about them."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.exit_codes import ExitCode
from finetune_api.problems import Problem


class UserError(Exception):
    """The job, its data or its flags are wrong: a retry fails the same way. Carries one problem per fault."""

    exit_code = ExitCode.USER_ERROR

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[Problem]]]:
        """Keep the problems across process borders (Ray pickles exceptions by their arguments)."""
        return type(self), (self.problems,)


class Interrupted(Exception):
    """Training was asked to stop and did, after saving a checkpoint."""

    exit_code = ExitCode.INTERRUPTED


class GateNotPassed(Exception):
    """An evaluation missed a bound that the job sets; what was measured is in storage."""

    exit_code = ExitCode.GATE_NOT_PASSED


class TrainingFailed(Exception):
    """A stage failed for a reason that is not the user's, and retries were of no use.

    Args:
        advice: what to do about it, where that is known.
        node: name of the node on which a GPU fault happened.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, text: str = "", advice: str = "", node: str | None = None) -> None:
        super().__init__(text)
        self.advice, self.node = advice, node


class Outage(Exception):
    """A service that the job needs does not answer. The same job may succeed later."""

    exit_code = ExitCode.FAILED


class WorkersMissing(Exception):
    """Workers did not come to where the others waited for them: one of them is slow, or cut off."""

    exit_code = ExitCode.FAILED


class OutOfMemory(TrainingFailed):
    """A device or the host ran out of memory."""

    exit_code = ExitCode.OUT_OF_MEMORY


def exit_code_of(error: BaseException) -> ExitCode:
    """What an error that ends a run says to whoever started it."""
    return getattr(error, "exit_code", ExitCode.FAILED)
