"""Our `sft` stage against plain `trl sft`: `python benchmarks/step_time.py`.

Both train the same model on the same rows with the same settings, at the same time, each in processes of its own that
are stopped (SIGSTOP) during the other's turn. Both therefore see the same load of the machine, so the ratio is
meaningful on a busy machine. Only steady steps are compared: start-up, and in each turn the step that spans the stop,
are excluded. Turns are long, since after a stop Ray's daemons first catch up: in turns of 10 steps (2.5 s) that adds
about 0.2 to the ratio. The losses are compared too: equal work gives equal losses.

Also printed are the parts of our start-up to the first step, and CPU seconds per step of all processes of each side.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "large": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}
MAX_LENGTH, BATCH, LEARNING_RATE, WARMUP = 256, 4, 1e-3, 10
ENOUGH_STEPS = 100_000
"""More than there is time for; both are terminated."""
PROMISED = 1.05
PATIENCE_SECONDS = 300.0
"""The longest time that a side may take to its next steps."""


@dataclass
class Runner:
    """One side: its processes, and the end of each of its steps on a clock that keeps running while it is stopped."""

    name: str
    process: subprocess.Popen[str]
    steps: Path
    log: Path
    durations: list[list[float]] = field(default_factory=list)
    """Seconds of each steady step, by turn."""
    cpu: float = 0.0
    training_cpu: float = 0.0
    """CPU seconds of the training process, without Ray's daemons and the driver."""
    cpu_steps: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete lines that the side has written so far."""
        text = self.steps.read_text() if self.steps.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def said(self) -> str:
        """Return all output of the side so far."""
        return self.log.read_text()

    def must_live(self, started: float) -> None:
        """Check that the process still runs.

        Raises:
            SystemExit: it has ended, or its time since `started` (monotonic) is over.
        """
        if self.process.poll() is not None:
            raise SystemExit(f"{self.name} ended early:\n{self.said()[-3000:]}")
        if time.monotonic() - started > PATIENCE_SECONDS:
            raise SystemExit(f"{self.name}: no step in {PATIENCE_SECONDS:.0f} s:\n{self.said()[-3000:]}")

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def signal(self, number: int) -> None:
        for process in self.tree():
            if process.is_running():
                process.send_signal(number)

    def turn(self, steps: int) -> None:
        """Run for so many steps, and record those that are entirely in this turn."""
        before, cpu = len(self.rows()), self.cpu_seconds()
        self.signal(signal.SIGCONT)
        wait_for_steps(self, before + steps + 1)
        self.signal(signal.SIGSTOP)
        ends = [row["seconds"] for row in self.rows()[before:]]
        self.durations.append([after - earlier for earlier, after in pairwise(ends)])
        spent = [seconds - cpu.get(pid, 0.0) for pid, seconds in self.cpu_seconds().items()]
        self.cpu, self.training_cpu = self.cpu + sum(spent), self.training_cpu + max(spent)
        self.cpu_steps += len(ends)

    def cpu_seconds(self) -> dict[int, float]:
        """Return the CPU seconds so far, by process."""
        return {process.pid: sum(process.cpu_times()[:2]) for process in self.tree() if process.is_running()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=int, default=6, help="turns of each side")
    parser.add_argument("--steps", type=int, default=60, help="steps of a turn")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of each side; 1 varies least on a busy machine")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory() as directory:
        measure(Path(directory), options)


def measure(directory: Path, options: argparse.Namespace) -> None:
    """Run both sides in turn and print the results."""
    make_inputs(directory, SIZES[options.size])
    with ExitStack() as running:
        started = time.time()
        ours = start_ours(directory, options.threads)
        running.callback(end, ours)
        timeline = Timeline(ours, started)
        timeline.first_step()
        ours.signal(signal.SIGSTOP)
        plain = start_plain(directory)
        running.callback(end, plain)
        wait_for_steps(plain, WARMUP)
        plain.signal(signal.SIGSTOP)
        ours.signal(signal.SIGCONT)
        wait_for_steps(ours, WARMUP)
        ours.signal(signal.SIGSTOP)
        for turn in range(options.turns):
            for side in (ours, plain) if turn % 2 else (plain, ours):
                side.turn(options.steps)
        report(ours, plain)
        timeline.show()


def make_inputs(directory: Path, size: dict[str, int]) -> None:
    """Write a model from scratch, a tokenizer and conversations of uneven length, as both sides read them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from finetune_api.stages import TokenizerSpec
    from finetune_trainer.stages.tokenizer.stage import train_tokenizer

    rows = [conversation(number) for number in range(2000)]
    texts = [message["content"] for row in rows for message in row["messages"]]
    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 2000})
    tokenizer = train_tokenizer(spec, texts, 512)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(**size, num_key_value_heads=2, head_dim=64, vocab_size=8000, **special)
    for part in (Qwen3ForCausalLM(config), tokenizer):
        part.save_pretrained(directory / "model")
    (directory / "data").mkdir()
    (directory / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(number: int) -> dict[str, Any]:
    words = " ".join(f"{number * step % 997}" for step in range(1, 20 + number % 60))
    turns = [("user", f"Multiples of {number}, please."), ("assistant", words)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def start_ours(directory: Path, threads: int) -> Runner:
    """Start `finetune run` with one `sft` stage."""
    sft = {
        "data": {"sources": [{"file": "data/train.jsonl"}], "shuffle": False},
        "maxLength": MAX_LENGTH,
        "maxSteps": ENOUGH_STEPS,
        "saveSteps": ENOUGH_STEPS,
        "perDeviceTrainBatchSize": BATCH,
        "learningRate": LEARNING_RATE,
        "warmupRatio": 0,
    }
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "ours"},
        "spec": {
            "model": {"path": "model", "dtype": "float32"},
            "stages": [{"sft": sft}],
            "resources": {"cpusPerNode": str(threads)},
            "storage": {"path": str(directory / "runs")},
        },
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    command = ["-c", "from finetune_cli.main import main; main()", "run", str(path)]
    return start("finetune run", command, directory, directory / "runs/ours/stages/00-sft/metrics.jsonl")


def start_plain(directory: Path) -> Runner:
    """Start `trl sft` as its command line does, with a clock in addition."""
    arguments = {
        "model_name_or_path": directory / "model",
        "dataset_name": directory / "data",
        "output_dir": directory / "plain",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "assistant_only_loss": True,
        "max_length": MAX_LENGTH,
        "max_steps": ENOUGH_STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    steps = directory / "plain.jsonl"
    return start("trl sft", ["-c", CLOCKED_TRL.format(steps=str(steps)), *flags], directory, steps)


CLOCKED_TRL = """
import json, time
import transformers.trainer
from trl.scripts.sft import main, make_parser

class Clock(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            with open({steps!r}, "a") as file:
                file.write(json.dumps({{"seconds": time.monotonic(), "loss": float(logs["loss"])}}) + "\\n")

transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
main(*make_parser().parse_args_and_config(fail_with_unknown_args=True))
"""


def start(name: str, command: list[str], directory: Path, steps: Path) -> Runner:
    env = os.environ | {"FINETUNE_CACHE": str(directory / "cache")}
    log = directory / f"{name.replace(' ', '-')}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # as Ray's workers do, since Linux divides a busy CPU among sessions
        )
    return Runner(name, process, steps, log)


def wait_for_steps(side: Runner, count: int) -> None:
    """Wait until the side has taken so many steps.

    Raises:
        SystemExit: it ended before, or took too long.
    """
    started = time.monotonic()
    while len(side.rows()) < count:
        side.must_live(started)
        time.sleep(0.05)  # poll, because another program writes the file


class Timeline:
    """The times of our side's start-up phases, detected from its processes and its output."""

    SAYS = (
        ("interpreter, libraries, checks of the job", ": reading "),
        ("data tokenised (Ray starts meanwhile)", " rows, "),
        ("workers up, libraries loaded in them", "[1/1 sft]: "),
        ("model, trainer", "model ready"),
    )

    def __init__(self, side: Runner, started: float) -> None:
        self.side, self.started = side, started
        self.marks: list[tuple[str, float]] = []

    def first_step(self) -> None:
        """Wait for the first step and record the phases before it.

        Raises:
            SystemExit: it never came.
        """
        begun, seen = time.monotonic(), dict[str, float]()
        while not self.side.rows():
            self.side.must_live(begun)
            said = self.side.said()
            for what, sign in self.SAYS:
                if sign in said:
                    seen.setdefault(what, time.time() - self.started)
            time.sleep(0.02)  # poll, because another program writes the files
        seen["first step, with samples before it"] = time.time() - self.started
        self.marks = list(seen.items())
        self.processes = self._processes()

    def _processes(self) -> list[tuple[str, float]]:
        """Return the seconds from the start to the creation of Ray's daemon and of the worker."""
        births = []
        for process in self.side.tree():
            name = " ".join(process.cmdline())
            for part, title in (("raylet/raylet", "Ray's daemon"), ("RayTrainWorker", "the worker's process")):
                if part in name:
                    births.append((title, process.create_time() - self.started))
        return births

    def show(self) -> None:
        print("start-up of finetune run, seconds from the start (and of the part):")
        before = 0.0
        for what, at in self.marks:
            print(f"  {at:6.1f}  ({at - before:5.1f})  {what}")
            before = at
        for what, at in self.processes:
            print(f"  {at:6.1f}           {what} is born")


def report(ours: Runner, plain: Runner) -> None:
    """Print medians, the ratio of each pair of turns, and whether the losses are equal."""
    for side in (ours, plain):
        steady = [duration for turn in side.durations for duration in turn]
        print(
            f"{side.name}: median {statistics.median(steady):.4f} s a step over {len(steady)} steps; "
            f"{side.cpu / max(1, side.cpu_steps):.3f} CPU s a step, "
            f"{side.training_cpu / max(1, side.cpu_steps):.3f} of them in the process that trains"
        )
    pairs = zip(ours.durations, plain.durations, strict=True)
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in pairs if a and b)
    ratio = statistics.median(ratios)
    verdict = "within" if ratio <= PROMISED else "OVER"
    print(f"ratio of step times, median of {len(ratios)} pairs of turns: {ratio:.3f} ({verdict} {PROMISED})")
    print("all pairs: " + ", ".join(f"{one:.3f}" for one in ratios))
    losses = [[row["loss"] for row in side.rows()] for side in (ours, plain)]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=False))
    print(f"losses: {losses[0][0]:.4f} at first; largest difference in {min(map(len, losses))} steps {worst:.1e}")


def end(side: Runner) -> None:
    """Terminate the side like a user with SIGTERM, on which ours saves a checkpoint and stops its Ray."""
    if side.process.poll() is not None:
        return
    side.signal(signal.SIGCONT)
    side.process.terminate()
    try:
        side.process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        side.process.kill()


if __name__ == "__main__":
    main()
