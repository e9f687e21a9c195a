"""Count which experts routers choose, and with what weights, for scores and load statistics."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.esft.families import routers

# Families whose routers only compute a softmax over the chosen experts.
_SOFTMAX_OVER_TOP_K = ("gpt_oss", "granitemoe", "openai_privacy_filter")


@dataclass
class LayerCounts:
    """Counts of one layer's router, on the model's device."""

    counts: Tensor
    """int64 [E]: how often each expert was in the top K."""
    gates: Tensor
    """float64 [E]: sums of raw routing weights."""
    tokens: Tensor
    """int64 []: number of tokens."""

    def as_tensor(self) -> Tensor:
        """Return float64 [3, E]: counts, gates, and the number of tokens in each column; integers are exact to 2^53."""
        return torch.stack([self.counts.double(), self.gates, self.tokens.double().expand(len(self.counts))])


class RoutingCounter:
    """A counter of routing, as a context manager or between `attach` and `detach`. Padded tokens are not counted.

    Args:
        model: a transformers model, or a PEFT model around one.
        gates: whether to sum routing weights too, which costs a softmax per layer.
        training: whether to count in training mode only.
    """

    def __init__(self, model: Any, *, gates: bool = False, training: bool = False) -> None:
        self.model: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.gates, self.training = gates, training
        self.layers: dict[int, LayerCounts] = {}
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> Self:
        """Register the hooks that count."""
        base = self.model.base_model
        # Before the hooks that remove the mask (`model.right_padding`, `model.document_masks`).
        self._handles.append(base.register_forward_pre_hook(self._record_mask, with_kwargs=True, prepend=True))
        for index, router in routers(self.model).items():
            hook = _RouterHook(self, index, self.model.config.model_type)
            self._handles.append(router.register_forward_hook(hook))
        return self

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_counts(self) -> dict[int, Tensor]:
        """Return the counts [E] by layer since the last call."""
        taken = {index: layer.counts for index, layer in self.layers.items()}
        self.layers = {}
        return taken

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def _record_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask.reshape(-1).bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def add(self, index: int, num_experts: int, chosen: Tensor, weights: Tensor | None) -> None:
        """Add a batch's routing of one layer.

        Args:
            chosen: [tokens, K] expert ids.
            weights: [tokens, K] raw routing weights, or None if they are not counted.
        """
        keep = self._mask if self._mask is not None and len(self._mask) == len(chosen) else slice(None)
        kept = chosen[keep]
        seen = self.layers.setdefault(index, _empty(num_experts, kept.device))
        seen.tokens += len(kept)
        seen.counts.scatter_add_(0, kept.reshape(-1), torch.ones_like(kept).reshape(-1))
        if weights is not None:
            seen.gates.index_add_(0, kept.reshape(-1), weights[keep].reshape(-1))


class _RouterHook:
    """A forward hook on one router."""

    def __init__(self, counter: RoutingCounter, index: int, family: str) -> None:
        self.counter, self.index, self.family = counter, index, family

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.counter.training and not module.training:
            return
        logits, weights, chosen = _parse_output(output, self.family)
        raw = raw_weights(logits, weights, chosen, self.family) if self.counter.gates else None
        self.counter.add(self.index, logits.shape[-1], chosen, raw)


def raw_weights(logits: Tensor, weights: Tensor, chosen: Tensor, family: str) -> Tensor:
    """Return the chosen experts' routing weights before renormalization and scaling, float64 [tokens, K].

    A router's weights are its affinities (the softmax or the sigmoid of the logits), unchanged, or divided by their sum
    over the top K (Mixtral, Qwen3-MoE, DeepSeek-V3) and scaled. Their ratio to softmax and sigmoid therefore shows
    which one the affinities are. If they are proportional to neither, or the family computes them over the chosen
    experts alone (gpt-oss), the router's weights are returned.
    """
    if family.startswith(_SOFTMAX_OVER_TOP_K) or logits.shape[0] != chosen.shape[0]:
        return weights.double()
    affinities = [scores.gather(-1, chosen) for scores in (logits.double().softmax(-1), logits.double().sigmoid())]
    ratios = [weights.double() / affinity.clamp(min=1e-30) for affinity in affinities]
    # One ratio for all tokens is stronger evidence than one per token, which is trivial for K = 1.
    for by_token in (False, True):
        for affinity, ratio in zip(affinities, ratios, strict=True):
            if _is_constant(ratio if by_token else ratio.reshape(1, -1)):
                return affinity
    return weights.double()


def _is_constant(ratios: Tensor) -> bool:
    """Return whether the values of each row are equal up to rounding to bfloat16."""
    if not ratios.numel():
        return True
    spread = (ratios.amax(-1) - ratios.amin(-1)) / ratios.mean(-1).clamp(min=1e-30)
    return bool((spread < 0.05).all())


def _parse_output(output: Any, family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [tokens, E], weights and ids [tokens, K] from a router's output."""
    parts = output[:3] if isinstance(output, tuple) else ()
    if len(parts) == 3 and all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        logits, weights, chosen = parts
        if weights.shape == chosen.shape and not chosen.is_floating_point():
            return logits, weights, chosen
    message = f"{family}'s router does not return (logits, weights, expert ids): its experts' scores can't be measured"
    raise UserError([Problem("model", message)])


def _empty(num_experts: int, device: torch.device) -> LayerCounts:
    return LayerCounts(
        torch.zeros(num_experts, dtype=torch.int64, device=device),
        torch.zeros(num_experts, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
