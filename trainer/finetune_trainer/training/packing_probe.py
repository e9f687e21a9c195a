"""Measures whether a model keeps the documents of a packed row apart, because no configuration says so."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from finetune_api.problems import Problem
from finetune_api.training import TrainingSpec
from finetune_trainer.data import PackedCollator
from finetune_trainer.model.document_masks import Form, documents_separated, forms

FIRST, OTHER, MEASURED, ROW = 11, 17, 13, 40
"""Tokens in the document before the measured one (two lengths), in the measured one, and in a packed row."""
EARLY = 4
"""Tokens at the start of a document that even a short convolution mixes with the previous document."""
ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest effect of rounding, relative to the standard deviation of the outputs. Known leaks change the outputs by
1e-2 or more (tests/packing), in trained models by far more."""
MIXED = "one document changes the next"
SHIFTED = "positions count from the start of the row, not of the document"

Batch = dict[str, Any]
Take = Callable[[str, Tensor, Tensor], None]
Call = Callable[[Any, Batch], Tensor]
"""Calls a model with a batch, including `labels`, and returns a vector for each token: [B, T, width]."""


@dataclass(frozen=True)
class Finding:
    """The result of a probe: the form that keeps documents apart, or the reason why no form does."""

    form: Form | None
    reason: str = ""
    needs: str = ""
    """The remedy, as transformers' or a kernel's error describes it."""


class NotMeasurable(Exception):
    """The outputs of the model are not finite, so they cannot be compared."""


def logits(model: Any, batch: Batch) -> Tensor:
    """Call a model as transformers' Trainer does, without its loss, and return its logits [B, T, vocabulary]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs: Tensor = model(**inputs, use_cache=False).logits
    return outputs


def log_probs(model: Any, batch: Batch) -> Tensor:
    """Call a model as TRL's SFTTrainer does, and return the log-probabilities [B, T - 1, 1] of the next labels."""
    outputs: Tensor = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    return outputs[..., None]


@dataclass(frozen=True)
class Probe:
    """Compares the outputs for a document in packed rows, made by the training collator, with those for it alone.

    Args:
        model: a causal language model. It may be a PEFT model, or sharded by ZeRO-3: then every worker must probe.
        rows: packed rows per batch.
        compute: the compute dtype of the model.
        call: `logits` or `log_probs`.
    """

    model: Any
    rows: int
    compute: torch.dtype
    call: Call = logits

    def find(self) -> Finding:
        """Return the first form in which the model keeps documents apart, or the reason why there is none.

        Raises:
            NotMeasurable: the outputs for the document alone are not finite.
            Exception: any error of the model for packed rows with only positions.
        """
        reason, needs = "", ""
        with _evaluating(self.model):
            alone = self._alone()
            for form in forms(self.model):
                try:
                    fault = self._fault(form, alone)
                except Exception as error:  # models may refuse a form by any exception
                    if form == Form.POSITIONS:
                        raise
                    fault = _first_line(error)
                    if form == Form.BOUNDS and _tells_what_packing_needs(error):
                        needs = fault
                if fault is None:
                    return Finding(form)
                if form == Form.POSITIONS:
                    reason = self._mixing() if fault == MIXED else fault
        return Finding(None, reason, needs)

    def _fault(self, form: Form, alone: Tensor) -> str | None:
        """Return how packed rows in a form differ from the document alone, or None if they do not."""
        packed, changed = self._packed(form, FIRST, 0), self._packed(form, FIRST, 1)
        if not distance(packed, changed, alone) <= ROUNDING[self.compute]:  # also true for NaN
            return MIXED
        moved = self._packed(form, OTHER, 1)
        near = all(distance(one, alone, alone) <= 3 * ROUNDING[self.compute] for one in (packed, moved))
        return None if near else SHIFTED

    def _alone(self) -> Tensor:
        """Return the outputs for the measured document in a row of its own."""
        ids = self._ids(MEASURED, 2).expand(self.rows, -1)
        outputs = self._outputs({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, 0)
        if not bool(outputs.isfinite().all()):
            raise NotMeasurable("the model's outputs are not finite")
        return outputs

    def _packed(self, form: Form, before: int, seed: int) -> Tensor:
        """Return the outputs for the measured document after a document of `before` tokens."""
        ids = torch.cat([self._ids(before, seed), self._ids(MEASURED, 2)]).tolist()
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [before, MEASURED]}
        batch = PackedCollator(0, ROW, padding_mask=True)([row] * self.rows)
        with documents_separated(self.model, form):
            return self._outputs(batch, before)

    def _ids(self, length: int, seed: int) -> Tensor:
        """Return random tokens from the middle of the vocabulary, where models have no special tokens."""
        size = self.model.config.get_text_config().vocab_size
        return torch.randint(size // 4, size // 2, (length,), generator=torch.Generator().manual_seed(seed))

    def _outputs(self, batch: Batch, start: int) -> Tensor:
        """Return the outputs [B, MEASURED - 1, width] for the measured document.

        The last token is omitted, because the fused head has no output for it.
        """
        device = self.model.device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        return self.call(self.model, moved)[:, start : start + MEASURED - 1].float()

    def _mixing(self) -> str:
        """Return a message with the first module that mixes documents.

        Its output for a document depends on the previous document although its input does not.
        """
        seen: dict[str, deque[tuple[Tensor, Tensor]]] = defaultdict(deque)  # a module may be called several times
        found: list[str] = []

        def remember(name: str, inputs: Tensor, output: Tensor) -> None:
            seen[name].append((inputs, output))

        def compare(name: str, inputs: Tensor, output: Tensor) -> None:
            before, after = seen[name].popleft() if seen[name] else (inputs, output)
            if _close(inputs, before, self.compute) and not _close(output, after, self.compute):
                found.append(name)

        for seed, take in enumerate((remember, compare)):
            with _watched(self.model, take):
                self._packed(Form.POSITIONS, FIRST, seed)
        if not found:
            return MIXED
        return f"{type(self.model.get_submodule(found[0])).__name__} ({found[0]}) carries one document into the next"


def packed_rows(spec: TrainingSpec) -> int:
    """Return the rows per batch of a probe: 2 if a batch of the stage can contain several packed rows, else 1."""
    return min(2, max(spec.per_device_train_batch_size, spec.per_device_eval_batch_size))


def packing_problem(where: str, config: PretrainedConfig, finding: Finding) -> Problem:
    """Return the problem of a stage whose model mixes packed documents.

    Args:
        where: path of the stage in the job.
        config: configuration of the model.
        finding: result of the probe.
    """
    message = f"is true, but {config.model_type} does not keep the documents of a packed row apart: {finding.reason}"
    remedy = f"{finding.needs.removesuffix('.')}, or set packing: false" if finding.needs else "Set packing: false"
    return Problem(f"{where}.packing", f"{message}. {remedy}")


def distance(one: Tensor, other: Tensor, scale: Tensor) -> float:
    """Return the distance of outputs [B, T, width], relative to the standard deviation of `scale`.

    It is the root mean square over the width, averaged over the first tokens or over all: the larger of the two.
    """
    apart = (one - other).square().mean(-1).sqrt()
    return float(torch.maximum(apart[:, :EARLY].mean(), apart.mean()) / scale.std())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _watched(model: nn.Module, take: Take) -> Iterator[None]:
    """Pass each module's name, input and output [B, MEASURED, width] to `take`, in the order in which modules return.

    Modules of torch itself are omitted: the model's module around them is more informative.
    """

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs, outputs = (_per_token(values) for values in ((*args, *kwargs.values()), (output,)))
            if inputs is not None and outputs is not None:
                take(name, inputs, outputs)

        return record

    own = [(name, module) for name, module in model.named_modules() if name and not _is_torchs(module)]
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _per_token(values: tuple[Any, ...]) -> Tensor | None:
    """Return the first tensor with a vector for each token of a row, limited to the measured document."""
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    found = (one for one in flat if isinstance(one, Tensor) and one.ndim == 3 and one.shape[1] == ROW)
    first = next(found, None)
    return None if first is None else first[:, FIRST : FIRST + MEASURED].float().cpu()


def _close(one: Tensor, other: Tensor, compute: torch.dtype) -> bool:
    return float((one - other).abs().max()) <= ROUNDING[compute] * float(other.abs().max())


def _tells_what_packing_needs(error: Exception) -> bool:
    """Whether an error is transformers' refusal of packed rows without a kernel, and not a bug."""
    return type(error) is ValueError and "packed" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
