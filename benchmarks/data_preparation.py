"""Speed and memory of data preparation as data grows: `benchmarks/data_preparation.py [--megabytes 10 100 1000]`.

Each size is prepared for `pretrain` in a process of its own, with a byte-level BPE of 8,000 tokens, into an empty
cache. The text is the language reference and the standard library's sources, each copy of a source under another
number so that all documents are distinct. Memory is of each process by itself, sampled every 20 ms: `anonymous`
excludes pages of mapped files, which the kernel reclaims when it needs them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import psutil

MB = 1_000_000
COLUMNS = (
    "MB",
    "processes",
    "seconds",
    "MB/s",
    "tokens",
    "tokens/s",
    "baseline MB",
    "peak RSS MB",
    "peak anonymous MB",
)


def documents() -> Iterator[str]:
    """Yield an endless corpus of documents."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [*topics.values(), *(path.read_text(errors="replace") for path in library)]
    for number in itertools.count():
        for text in texts:
            yield f"# {number}\n{text}"


def write_corpus(path: Path, size: int) -> None:
    """Write a jsonl file of about `size` bytes of text."""
    written = 0
    with path.open("w") as file:
        for text in documents():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(itertools.islice(documents(), 400), trainer)
    tokenizer.save(str(path))


class Peak(threading.Thread):
    """Peak memory of any one process of this process tree."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rss, self.anonymous, self.done = 0, 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.02):
            for process in [me, *me.children(recursive=True)]:
                self._sample(process)

    def _sample(self, process: psutil.Process) -> None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            return
        self.rss = max(self.rss, memory.rss)
        self.anonymous = max(self.anonymous, memory.rss - memory.shared)


def measure(corpus: Path, tokenizer: Path, num_proc: int) -> list[str]:
    """Prepare one corpus and return a row of the table."""
    from transformers import PreTrainedTokenizerFast

    from finetune_api.stages import PretrainSpec
    from finetune_trainer.data import prepare

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>")
    stage = PretrainSpec.model_validate({"data": {"sources": [{"file": str(corpus)}]}, "blockSize": 1024})
    baseline, peak = psutil.Process().memory_info().rss, Peak()
    peak.start()
    with tempfile.TemporaryDirectory(dir=corpus.parent) as cache:
        report = prepare(stage, fast, None, "pretrain", Path(cache), corpus.parent, num_proc).report
    peak.done.set()
    speed = [f"{report.seconds:.1f}", f"{report.bytes / MB / report.seconds:.1f}"]
    counts = [f"{report.tokens:,}", f"{report.tokens_per_second:,.0f}"]
    memory = [f"{value / MB:.0f}" for value in (baseline, peak.rss, peak.anonymous)]
    return [f"{report.bytes / MB:.0f}", str(num_proc), *speed, *counts, *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--num-proc", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", nargs=2, type=Path, metavar=("CORPUS", "TOKENIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(" | ".join(measure(*options.one, options.num_proc)))
        return
    print(" | ".join(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as work:
        corpus, tokenizer = Path(work, "corpus.jsonl"), Path(work, "tokenizer.json")
        write_tokenizer(tokenizer)
        for size in options.megabytes:
            write_corpus(corpus, size * MB)
            fresh = [
                sys.executable,
                __file__,
                "--one",
                str(corpus),
                str(tokenizer),
                "--num-proc",
                str(options.num_proc),
            ]
            subprocess.run(fresh, check=True)


if __name__ == "__main__":
    main()
