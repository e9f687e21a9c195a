"""Run tasks of lm-evaluation-harness. They need the package lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from finetune_api.problems import Problem, did_you_mean
from finetune_api.stages import EvaluateSpec
from finetune_trainer.model.router_logits import no_router_logits
from finetune_trainer.model.source import local_path


def task_problems(spec: EvaluateSpec, where: str, base_dir: str) -> list[Problem]:
    """Return why the tasks cannot run: the package, the directory of tasks or a task is missing."""
    if not spec.tasks:
        return []
    if find_spec("lm_eval") is None:
        return [Problem(f"{where}.tasks", "needs lm-evaluation-harness: install finetune-operator[trainer,lm-eval]")]
    if spec.include_path is not None and not local_path(spec.include_path, base_dir).is_dir():
        return [Problem(f"{where}.includePath", f"no such directory: {spec.include_path}")]
    known = _manager(spec, base_dir).all_tasks
    return [
        Problem(f"{where}.tasks[{at}]", f"lm-evaluation-harness has no task {name!r}{did_you_mean(name, known)}")
        for at, name in enumerate(spec.tasks)
        if name not in known
    ]


def run_tasks(model: Any, tokenizer: Any, spec: EvaluateSpec, names: Sequence[str], base_dir: str) -> dict[str, float]:
    """Run the tasks and return their metrics by name, such as `hellaswag.acc_norm`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    batch_size = spec.per_device_eval_batch_size
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), spec.seed)
    manager = _manager(spec, base_dir)
    with no_router_logits(model):
        found = simple_evaluate(
            model=wrapped, tasks=list(names), task_manager=manager, limit=spec.task_limit, bootstrap_iters=0, **seeds
        )
    return task_metrics(found["results"])


def _manager(spec: EvaluateSpec, base_dir: str) -> Any:
    from lm_eval.tasks import TaskManager

    own = spec.include_path
    return TaskManager(include_path=None if own is None else str(local_path(own, base_dir)))


def task_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the harness's results (`{"hellaswag": {"acc,none": 0.3, "acc_stderr,none": ...}}`) by metric name.

    A filter other than `none` is part of the name: `gsm8k.exact_match.strict-match`.
    """
    metrics = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if chosen and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                metrics[f"{task}.{metric}" + ("" if chosen == "none" else f".{chosen}")] = float(value)
    return metrics
