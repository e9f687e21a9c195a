"""Run one node of a Ray cluster on this machine, like a pod: `ray_node.py head|worker|drive RUN_CONFIG PORT`.

It differs from `finetune_trainer.launch.node` only in the ports, because the nodes share this machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_api.slots import offered
from finetune_trainer.forks.client import run_fork
from finetune_trainer.launch.fork_imports import forks
from finetune_trainer.launch.node import _RAY, _reachable
from finetune_trainer.runtime import apply_environment, quiet_environment

HEAD, WORKER = "127.0.0.1", "127.0.0.2"
"""Ray Train counts local ranks by address, so each node needs its own."""


def node(role: str, config: Path, port: str) -> int:
    """Start the node; the head then drives the job and returns its exit code."""
    run = RunConfig.model_validate_json(config.read_text())
    apply_environment(quiet_environment(accelerator=False))
    os.environ["OMP_NUM_THREADS"] = "1"
    share = ["--num-cpus=16", "--num-gpus=0", f"--resources={offered(run.job.spec.resources)}", "--disable-usage-stats",
             f"--object-store-memory={100 << 20}", "--min-worker-port=0", "--max-worker-port=0",
             f"--node-ip-address={WORKER if role == 'worker' else HEAD}"]  # fmt: skip
    with forks(run, print):
        if role == "worker":
            assert _reachable(HEAD, int(port))
            return subprocess.run([*_RAY, "start", f"--address={HEAD}:{port}", "--block", *share]).returncode
        head = [*_RAY, "start", "--head", f"--port={port}", "--include-dashboard=false", *share]
        subprocess.run(head, check=True, stdout=subprocess.DEVNULL)
        os.environ["RAY_ADDRESS"] = f"{HEAD}:{port}"
        code = run_fork([__file__, "drive", str(config), port])
        assert code is not None
        return code


def drive(config: Path) -> int:
    """Run the job on the available nodes."""
    from finetune_trainer.errors import UserError, exit_code_of
    from finetune_trainer.launch.pipeline import Pipeline
    from finetune_trainer.progress.plain_reporter import PlainReporter

    run = RunConfig.model_validate_json(config.read_text())
    try:
        Pipeline(run, PlainReporter(sys.stdout), threading.Event()).execute(resume=True, checked=True)
    except Exception as error:
        words = [str(one) for one in error.problems] if isinstance(error, UserError) else [str(error)]
        print("\n".join(["failed:", *words]), flush=True)
        return int(exit_code_of(error))
    return 0


if __name__ == "__main__":
    role, config, port = sys.argv[1:]
    sys.exit(drive(Path(config)) if role == "drive" else node(role, Path(config), port))
