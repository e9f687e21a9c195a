"""ESFT compared with other ways to train a mixture of experts, on the CPU in float32: `python benchmarks/esft.py`.

Each method has a process of its own, and they alternate step by step. Measured are the peak resident memory of AdamW
steps over that of the warm process, the median step's time, and the number of elements of AdamW's states.

- esft: the experts that token scores select (p = 0.2), in split storage
- full: every weight
- masking: all experts' stacks with a gradient, the rows that are not selected masked to zero
- lora: adapters of rank 16 on all experts (PEFT's `target_parameters`)
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.training import Lora
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare
from finetune_trainer.model.lora import lora_config
from finetune_trainer.plan.quantities import human_bytes

METHODS = ("esft", "full", "masking", "lora")
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}
TINY = SHAPE | {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
ROWS, LENGTH, STEPS = 4, 128, 6


def main() -> None:
    """Run all methods, or the method named by the argument in this process."""
    if len(sys.argv) > 1:
        serve(sys.argv[1])
        return
    results = compare()
    full = results["full"]
    for method, found in results.items():
        memory, seconds = found["memory"] / full["memory"], found["seconds"] / full["seconds"]
        print(
            f"{method:8} peak {human_bytes(int(found['memory']))} ({memory:.2f} of full), "
            f"step {found['seconds']:.3f} s ({seconds:.2f} of full), "
            f"{found['trained'] / 1e6:.2f} M trained, {found['states'] / 1e6:.2f} M elements of Adam's states"
        )


def compare() -> dict[str, dict[str, float]]:
    """Return what `serve` prints for each method; the methods alternate, so that other load affects all alike."""
    children = {method: start(method) for method in METHODS}
    turns = [{method: step(child) for method, child in children.items()} for _ in range(STEPS)]
    for child in children.values():
        child.communicate(timeout=60)
    seconds = {method: statistics.median(turn[method]["seconds"] for turn in turns[1:]) for method in METHODS}
    return {method: turns[-1][method] | {"seconds": seconds[method]} for method in METHODS}


def start(method: str) -> subprocess.Popen[str]:
    """Start a process that trains one step with this method for each line of input."""
    child = subprocess.Popen(
        [sys.executable, __file__, method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    answer(child)
    return child


def step(child: subprocess.Popen[str]) -> dict[str, float]:
    """Run one step of a process and return its figures."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return answer(child)


def answer(child: subprocess.Popen[str]) -> dict[str, float]:
    """Return the next JSON object that a process prints; libraries print other lines."""
    assert child.stdout is not None
    line = next((line for line in child.stdout if line.startswith("{")), None)
    if line is None:
        raise SystemExit(f"{child.args} ended with exit code {child.wait()}")
    found: dict[str, float] = json.loads(line)
    return found


def serve(method: str) -> None:
    """Run a step for each line of input; print what `train` yields, and peak resident bytes over the warm process."""
    torch.set_num_threads(2)
    list(islice(train(method, TINY), 2))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    steps = train(method, SHAPE)
    print("{}", flush=True)
    for _ in sys.stdin:
        found = next(steps)
        print(json.dumps(found | {"memory": resident("VmHWM") - before}), flush=True)


def train(method: str, shape: dict[str, int]) -> Iterator[dict[str, float]]:
    """Train on random tokens with AdamW; yield each step's seconds, trained weights and elements of AdamW's moments."""
    model, ids = build(shape), tokens(shape)
    trained = list(METHOD[method](model, ids))
    model = trained.pop(0)  # PEFT wraps the model
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    while True:
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        states = [value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim]
        yield {"seconds": seconds, "trained": sum(weight.numel() for weight in trained), "states": sum(states)}


def build(shape: dict[str, int]) -> Any:
    """Return a Qwen3-MoE with the loss that the trainers use."""
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **shape))
    for layer in expert_layers(model):
        nn.init.normal_(layer.router.weight, std=0.05)  # type: ignore[arg-type]
    model.config.use_cache = False
    add_fused_lm_head(model)
    return model.train()


def tokens(shape: dict[str, int]) -> torch.Tensor:
    """Return tokens [4, 128] of a narrow domain: a sixteenth of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape["vocab_size"] // 16, (ROWS, LENGTH), generator=generator)


def select(model: Any, ids: torch.Tensor) -> ExpertConfig:
    """Return the experts that the tokens select."""
    scores = measure_scores(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    return ExpertConfig(select_layers(scores.token, 0.2))


def esft(model: Any, ids: torch.Tensor) -> Iterator[Any]:
    """Yield the model, then its trained weights: the selected rows."""
    prepare(model, select(model, ids))
    yield model
    yield from (weight for weight in model.parameters() if weight.requires_grad)


def full(model: Any, ids: torch.Tensor) -> Iterator[Any]:
    """Yield the model, then all its weights."""
    yield model
    yield from model.parameters()


def masking(model: Any, ids: torch.Tensor) -> Iterator[Any]:
    """Yield the model, then the experts' stacks, with hooks that mask gradients."""
    config = select(model, ids)
    model.requires_grad_(False)
    yield model
    for layer in expert_layers(model):
        for name in layer.stacks:
            stack = getattr(layer.experts, name).requires_grad_(True)
            others = [expert for expert in range(layer.num_experts) if expert not in config.experts[layer.index]]
            stack.register_hook(lambda gradient, rows=others: gradient.index_fill(0, torch.tensor(rows), 0))
            yield stack


def lora(model: Any, ids: torch.Tensor) -> Iterator[Any]:
    """Yield the adapted model, then its adapters."""
    from peft import get_peft_model

    spec = Lora(targetModules=["gate_up_proj", "down_proj"])
    adapted = get_peft_model(model, lora_config(spec, model))
    yield adapted
    yield from (weight for weight in adapted.parameters() if weight.requires_grad)


METHOD = {"esft": esft, "full": full, "masking": masking, "lora": lora}


def resident(field: str) -> int:
    """Return a field of `/proc/self/status` in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
