"""Checks that need a GPU, as one script: `python benchmarks/gpu.py --part 1`, then `--part 2`.

It needs one GPU, no network and no Ray. Each check runs in a process of its own with its own time limit, and prints one
line of JSON: name, ok (null: skipped), seconds, values, and the class of its error. Models have random weights and are
created by the script. A part skips and reports each check that does not fit into the rest of its budget of seconds.

`--tiny` runs the code of all checks on the CPU, with tiny models; CI does. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpu_checks import environment
from gpu_checks.record import NEEDS_GPU, Check, Options, Result

BUDGETS = {1: 350, 2: 230}
"""Budget of each part in seconds, because a GPU may be available for only a few minutes at a time."""
TINY_SECONDS = 240
"""Time limit of a check with `--tiny`; most take some seconds, and longer on a busy machine."""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print their lines and return the exit code."""
    asked = _parser().parse_args(arguments)
    environment.set_up(asked.tiny, with_ray=not asked.no_ray)
    started = time.monotonic()
    if not asked.no_preload and not environment.preload(asked.tiny):
        print("an import opened the GPU: each check imports the libraries by itself", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--no-preload"])
    if not asked.tiny and not environment.has_gpu():
        print(f"{NEEDS_GPU}: use --tiny on a machine without one", file=sys.stderr)
        return 2
    from gpu_checks.catalog import CHECKS

    parts = (1, 2) if asked.part is None else (asked.part,)
    budget = asked.budget or (float("inf") if asked.tiny else sum(BUDGETS[part] for part in parts))
    wanted = [one for one in CHECKS if one.part in parts and (not asked.checks or one.name in asked.checks)]
    with tempfile.TemporaryDirectory(dir=asked.work, prefix="gpu-checks-") as directory:
        return report(run_all(wanted, Options(asked.tiny, Path(directory)), started + budget))


def run_all(checks: Iterable[Check], options: Options, end: float) -> Iterator[Result]:
    """Run checks one after the other, then yield the table of the memory that they measured.

    Args:
        end: when the budget is used up, by `time.monotonic`.
    """
    from gpu_checks.catalog import memory_table
    from gpu_checks.processes import run_check

    done = []
    for check in checks:
        rest, needed = end - time.monotonic(), 1 if options.tiny else check.seconds
        if rest < needed:
            yield Result(check.name, None, 0.0, skipped=f"{max(rest, 0):.0f} s of the budget are left, needs {needed}")
            continue
        done.append(run_check(check, options, min(rest, TINY_SECONDS if options.tiny else 2 * check.seconds)))
        yield done[-1]
    yield memory_table(done)


def report(results: Iterable[Result]) -> int:
    """Print a line for each result as it comes, and return the exit code."""
    failed = []
    for result in results:
        print(result.line(), flush=True)
        failed += [result.name] if result.ok is False else []
    print(f"failed: {', '.join(failed)}" if failed else "no check failed", file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", type=int, choices=BUDGETS, help="default: both")
    parser.add_argument("--budget", type=float, help="seconds; default: 350 for part 1 and 230 for part 2, on a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--checks", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--no-ray", action="store_true", help="a stand-in for Ray where it is installed, too")
    parser.add_argument("--no-preload", action="store_true", help="import nothing before the checks")
    parser.add_argument("--work", type=Path, help="directory for models and data; default: the system's temporary one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
