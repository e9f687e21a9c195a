"""Runs the tokenizer stage in the driver's process: BPE training uses all cores of one machine and no GPU."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_trainer.data import corpus_texts
from finetune_trainer.layout import StageLayout
from finetune_trainer.model.config import build_config, context_length
from finetune_trainer.progress.reporter import Reporter
from finetune_trainer.stage_graph import directories, place
from finetune_trainer.stages.tokenizer.stage import bytes_per_token, train_tokenizer
from finetune_trainer.storage.filesystem import Storage


def run_tokenizer_stage(run: RunConfig, storage: Storage, layout: StageLayout, reporter: Reporter) -> dict[str, float]:
    """Train the tokenizer, evaluate it on held-out text, save it, and return the metrics of the stage."""
    started = time.monotonic()
    spec = run.job.spec.stages[layout.index].tokenizer
    assert spec is not None and run.job.spec.model.config is not None
    train, held_out, size = corpus_texts(spec.data, f"{place(run, layout.index)}.data", **directories(run))
    reporter.log(f"{layout.title}: {size / 1e6:.1f} MB of text, vocabulary of {spec.vocab_size}")
    context = context_length(build_config(run.job.spec.model.config, None))
    tokenizer = train_tokenizer(spec, train, context)
    ratio = bytes_per_token(tokenizer, held_out)
    metrics = {"vocab_size": float(len(tokenizer)), **({"bytes_per_token": ratio} if ratio else {})}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        storage.upload(Path(directory), layout.result)
    done = {"steps": 0, "seconds": time.monotonic() - started, "metrics": metrics, "environment": {}}
    storage.write_text(layout.done, json.dumps(done, indent=1))
    return metrics
