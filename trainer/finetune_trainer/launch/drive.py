"""Drives one attempt on a cluster from its RunConfig to its outcome. Pod 0 runs it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_api.redact import redact
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import GateNotPassed, Interrupted, Outage, TrainingFailed, UserError, exit_code_of
from finetune_trainer.progress.attempt_report import AttemptReporter, termination_message
from finetune_trainer.progress.multi_reporter import Reporters
from finetune_trainer.progress.plain_reporter import PlainReporter
from finetune_trainer.progress.report_server import ReportServer
from finetune_trainer.runtime import apply_environment, node_name, quiet_environment

TERMINATION_LOG = Path("/dev/termination-log")
TOKEN_FILE_VARIABLE = "FINETUNE_TOKEN_FILE"
TRACEBACK_LINES = 20
log = logging.getLogger(__name__)


def drive(config: Path) -> ExitCode:
    """Run an attempt to its end and return its exit code. It resumes from the last checkpoint in storage.

    Args:
        config: path of the RunConfig.
    """
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=bool(run.job.spec.resources.gpus_per_node)))
    stop = threading.Event()
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])

    def request_stop(*_: object) -> None:
        reporter.stopping()
        stop.set()

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    with ReportServer(reporter.report, request_stop, read_token()):

        def hung(text: str) -> None:
            """End this process, whose main thread hangs."""
            os._exit(report_hung_driver(reporter, text))

        return report_outcome(reporter, lambda: _train(run, reporter, stop, hung))


def report_outcome(reporter: AttemptReporter, work: Callable[[], None]) -> ExitCode:
    """Call `work` and write its outcome to the log, the report and the pod's termination message.

    Returns:
        the exit code of this process.
    """
    node = None
    try:
        work()
        code, message = ExitCode.OK, ""
    except BaseException as error:
        code, message, node = exit_code_of(error), _message(error), getattr(error, "node", None)
        print(redact(message), file=sys.stderr, flush=True)
    reporter.ended(code, message, node)
    try:
        TERMINATION_LOG.write_text(termination_message(reporter.report()))
    except OSError as error:
        log.warning("no termination message: %s", error)
    return code


def report_hung_driver(reporter: AttemptReporter, text: str) -> ExitCode:
    """Report a driver that makes no progress in the same way as a stalled worker on its node."""
    print(redact(text), file=sys.stderr, flush=True)
    message = text.partition("; its stacks:")[0]
    reporter.stalled(message, node_name())

    def stalled() -> None:
        raise TrainingFailed(message, node=node_name())

    return report_outcome(reporter, stalled)


def _train(run: RunConfig, reporter: AttemptReporter, stop: threading.Event, hung: Callable[[str], None]) -> None:
    from finetune_trainer.preflight.gpu_node import require_fit_node

    with ThreadPoolExecutor(1) as thread:
        node_check = thread.submit(require_fit_node, run)
        from finetune_trainer.launch.pipeline import Pipeline  # its import takes seconds: the report server runs before

        node_check.result()
    pipeline = Pipeline(run, Reporters([PlainReporter(sys.stdout), reporter]), stop, hung)
    reporter.finished_before(pipeline.finished_stages())
    pipeline.execute(resume=True, checked=run.job.spec.kubernetes.preflight)


def _message(error: BaseException) -> str:
    """Return the problems of a wrong job, or else the last lines of the traceback."""
    if isinstance(error, UserError):
        return "\n".join(str(problem) for problem in error.problems)
    if isinstance(error, (GateNotPassed, Interrupted, Outage, TrainingFailed)):
        return _last_lines(str(error))
    return _last_lines("".join(traceback.format_exception(error)))


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TRACEBACK_LINES:])


def read_token() -> str:
    """Return the token of the attempt, which requests to the report server need.

    Raises:
        KeyError, OSError: there is no token, because the operator has not made this pod.
    """
    return Path(os.environ[TOKEN_FILE_VARIABLE]).read_text().strip()
