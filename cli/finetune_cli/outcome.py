"""Convert expected errors to messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from finetune_api.exit_codes import ExitCode


class CommandFailed(Exception):
    """A failure that is not the user's fault, such as a server that does not respond."""

    exit_code = ExitCode.FAILED


def guarded(action: Callable[[], None]) -> None:
    """Run an action. Print the message of an expected error to standard error and exit with its code."""
    from finetune_trainer.errors import GateNotPassed, Interrupted, Outage, OutOfMemory, TrainingFailed, UserError

    try:
        action()
    except UserError as error:
        _fail(ExitCode.USER_ERROR, [str(problem) for problem in error.problems])
    except (CommandFailed, Outage) as error:
        _fail(ExitCode.FAILED, [str(error)])
    except GateNotPassed as error:
        _fail(
            ExitCode.GATE_NOT_PASSED,
            [str(error), "the gate is not passed; to continue, change its bound and run with --resume"],
        )
    except Interrupted as error:
        _fail(ExitCode.INTERRUPTED, [f"{error}; run again with --resume"])
    except OutOfMemory as error:
        _fail(
            ExitCode.OUT_OF_MEMORY,
            [str(error), error.advice or "out of memory: `finetune plan` shows the memory by part"],
        )
    except TrainingFailed as error:
        advice = [error.advice] if error.advice else []
        _fail(ExitCode.FAILED, [str(error), *advice, "failed; checkpoints are kept: run again with --resume"])


def _fail(code: ExitCode, lines: list[str]) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if code is ExitCode.USER_ERROR and len(lines) > 1:
        print(f"{len(lines)} problems; nothing was started", file=sys.stderr)
    sys.stderr.flush()
    raise typer.Exit(int(code))
