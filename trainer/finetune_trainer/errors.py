"""Errors whose type says what to do about them."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.problems import Problem


class UserError(Exception):
    """The job, its data or its flags are wrong: a retry fails the same way. Carries one problem per fault."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[UserError], tuple[list[Problem]]]:
        """Keep the problems across process borders (Ray pickles exceptions by their arguments)."""
        return type(self), (self.problems,)


class Interrupted(Exception):
    """Training was asked to stop and did, after saving a checkpoint."""


class TrainingFailed(Exception):
    """A stage failed for a reason that is not the user's, and retries were of no use."""


class OutOfMemory(TrainingFailed):
    """A device or the host ran out of memory."""
