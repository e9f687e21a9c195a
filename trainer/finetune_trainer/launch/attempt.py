"""One attempt on a cluster, from its RunConfig to its last word: what pod 0 runs."""

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
from finetune_trainer.progress.attempt import AttemptReporter, termination_message
from finetune_trainer.progress.multi import Reporters
from finetune_trainer.progress.plain import PlainReporter
from finetune_trainer.progress.report_server import ReportServer
from finetune_trainer.runtime import apply_environment, node_name, quiet_environment

TERMINATION_LOG = Path("/dev/termination-log")
TOKEN_FILE_VARIABLE = "FINETUNE_TOKEN_FILE"
TRACEBACK_LINES = 20
log = logging.getLogger(__name__)


def drive(config: Path) -> ExitCode:
    """Run an attempt to its end, going on from whatever storage holds of earlier ones.

    Args:
        config: the RunConfig's file.
    """
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=bool(run.job.spec.resources.gpus_per_node)))
    stop = threading.Event()
    reporter = AttemptReporter([stage.title for stage in run.job.spec.stages])

    def ask_to_stop(*_: object) -> None:
        reporter.stopping()
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    with ReportServer(reporter.report, ask_to_stop, _token()):

        def hung(text: str) -> None:
            """End a driver whose main thread hangs."""
            os._exit(end_hung(reporter, text))

        return say_last_word(reporter, lambda: _train(run, reporter, stop, hung))


def say_last_word(reporter: AttemptReporter, work: Callable[[], None]) -> ExitCode:
    """Do the work; how it ended goes to the log, to the report and to the pod's termination message."""
    node = None
    try:
        work()
        code, message = ExitCode.OK, ""
    except BaseException as error:
        code, message, node = exit_code_of(error), _words(error), getattr(error, "node", None)
        print(redact(message), file=sys.stderr, flush=True)
    reporter.ended(code, message, node)
    try:
        TERMINATION_LOG.write_text(termination_message(reporter.report()))
    except OSError as error:
        log.warning("no termination message: %s", error)
    return code


def end_hung(reporter: AttemptReporter, text: str) -> ExitCode:
    """Tell of a driver that makes no progress as of a stalled worker on its node.

    Where it had found its workers stalled before, that is told: the store that they wait for hangs in its report, too.
    """
    print(redact(text), file=sys.stderr, flush=True)
    before = reporter.report()
    words, node = text.partition("; its stacks:")[0], node_name()
    if before.stalled:
        words, node = before.stalled, before.node
    reporter.stalled(words, node)

    def stalled() -> None:
        raise TrainingFailed(words, node=node)

    return say_last_word(reporter, stalled)


def _train(run: RunConfig, reporter: AttemptReporter, stop: threading.Event, hung: Callable[[str], None]) -> None:
    from finetune_trainer.preflight.gpu_node import require_fit_node

    with ThreadPoolExecutor(1) as beside:
        fit = beside.submit(require_fit_node, run)
        from finetune_trainer.launch.driver import Pipeline  # takes seconds to import: the report is served before

        fit.result()
    pipeline = Pipeline(run, Reporters([PlainReporter(sys.stdout), reporter]), stop, hung)
    reporter.finished_before(pipeline.finished_stages())
    pipeline.execute(resume=True, checked=run.job.spec.kubernetes.preflight)


def _words(error: BaseException) -> str:
    """What people need: the faults of a bad job, else the last lines of the traceback."""
    if isinstance(error, UserError):
        return "\n".join(str(problem) for problem in error.problems)
    if isinstance(error, (GateNotPassed, Interrupted, Outage, TrainingFailed)):
        return _last_lines(str(error))
    return _last_lines("".join(traceback.format_exception(error)))


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TRACEBACK_LINES:])


def _token() -> str:
    """The attempt's token.

    Raises:
        KeyError, OSError: there is none: the pod was not made by the operator.
    """
    return Path(os.environ[TOKEN_FILE_VARIABLE]).read_text().strip()
