"""Split stacked expert weights: the trained rows and the frozen rows of each stack become separate Parameters.

Each row is stored once, so the optimizer, the gradients, DDP and ZeRO only handle the trained rows, and weight decay
can't change a frozen row. Results are bit-identical: `eager` runs the family's own forward on a view of the rows in
their old order; every other implementation runs the library's grouped matrix product on the two parts and sums in the
library's order.

Alternatives that were rejected: masked gradients (optimizer state for all rows, and weight decay changes the masked
ones), PEFT's `target_parameters` (all experts), parametrizations (a copy of the whole layer in each forward pass).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _grouped_linear

from finetune_trainer.esft.families import ExpertLayer, expert_layers, stack_names
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.zero3 import gathered, is_divided, partition

FROZEN, TUNED = "frozen", "tuned"
_ALIGNMENT = 64


class SplitExperts(nn.Module):
    """A family's experts, split in place: a mixin in front of the family's own class.

    `<stack>_frozen` [E-k, ...] and `<stack>_tuned` [k, ...] replace each stack [E, ...]; a part without rows is absent.
    """

    tuned_ids: tuple[int, ...]
    """Ids of the trained experts, in the order of their rows."""
    frozen_ids: tuple[int, ...]
    place: Tensor
    """Buffer [E]: each expert's index among the frozen rows followed by the tuned rows."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [tokens, H] from hidden states [tokens, H], ids and weights [tokens, K], as the family does."""
        if self.config._experts_implementation == "eager":  # type: ignore[union-attr]
            return _eager(self, hidden_states, top_k_index, top_k_weights)
        return _grouped(self, hidden_states, top_k_index, top_k_weights)

    def part(self, stack: str, part: str) -> nn.Parameter | None:
        """Return the frozen or the tuned rows of a stack; None if there are none."""
        return getattr(self, f"{stack}_{part}", None)

    def rows(self, stack: str, part: str) -> Tensor | None:
        """Return the rows in the dtype of computation: trained rows may be float32 in a half-precision model."""
        rows = self.part(stack, part)
        return None if rows is None else rows.to(self._dtype(stack))

    def tuned_parameters(self) -> list[nn.Parameter]:
        """Return all trained rows."""
        found = (self.part(stack, TUNED) for stack in stack_names(self))
        return [rows for rows in found if rows is not None]

    def _dtype(self, stack: str) -> torch.dtype:
        frozen, tuned = self.part(stack, FROZEN), self.part(stack, TUNED)
        if frozen is not None:
            return frozen.dtype
        assert tuned is not None
        kind = tuned.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tuned.dtype


def split_experts(model: PreTrainedModel, config: ExpertConfig) -> list[ExpertLayer]:
    """Split the experts of every layer that has experts to train, in place; return those layers.

    A ZeRO-3 model is gathered, split and divided again layer by layer; every worker calls this.
    """
    layers = [layer for layer in expert_layers(model) if config.experts.get(layer.index)]
    for layer in layers:
        split_layer(layer.experts, config.experts[layer.index])
    return layers


def split_layer(experts: nn.Module, ids: Sequence[int]) -> None:
    """Split one layer's experts in place.

    Args:
        ids: the experts to train, in the order of their rows.
    """
    frozen = [expert for expert in range(int(experts.num_experts)) if expert not in set(ids)]  # type: ignore[arg-type]
    stacks = {name: getattr(experts, name) for name in stack_names(experts)}
    divided = is_divided(stacks.values())
    for name, stack in stacks.items():
        with gathered([stack]):
            parts = {FROZEN: stack.detach()[frozen], TUNED: stack.detach()[list(ids)]}
        delattr(experts, name)
        for part, rows in parts.items():
            if len(rows):
                rows = _align_like(rows, stack)
                experts.register_parameter(f"{name}_{part}", nn.Parameter(rows, requires_grad=part == TUNED))
        if divided:
            partition(experts)
    order = torch.tensor([*frozen, *ids])
    device = next(experts.parameters()).device
    experts.__class__ = _split_class(type(experts))  # type: ignore[arg-type]  # mypy denies that classes are hashable
    assert isinstance(experts, SplitExperts)
    experts.tuned_ids, experts.frozen_ids = tuple(ids), tuple(frozen)
    experts.register_buffer("place", order.argsort().to(device), persistent=False)


def _align_like(rows: Tensor, stack: Tensor) -> Tensor:
    """Return the rows at an address with the same offset to 64-byte alignment as the stack's, on a CPU.

    The last bit of a product with a single row on a CPU depends on the alignment, and weights that are mapped from a
    file can have any.
    """
    if rows.device.type != "cpu" or not stack.numel():
        return rows
    size = rows.element_size()
    memory = torch.empty(rows.numel() + _ALIGNMENT // size, dtype=rows.dtype)
    shift = (stack.data_ptr() - memory.data_ptr()) % _ALIGNMENT // size
    return memory[shift : shift + rows.numel()].view_as(rows).copy_(rows)


@cache
def _split_class(family: type[nn.Module]) -> type[nn.Module]:
    return type(f"Split{family.__name__}", (SplitExperts, family), {})


def _eager(experts: SplitExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run the family's own loop over the experts on views of the rows."""
    family: Any = type(experts).__mro__[2]
    views = {name: _RowView(experts, name) for name in stack_names(experts)}
    output: Tensor = inspect.unwrap(family.forward)(_ExpertsProxy(experts, views), hidden, index, weights)
    if any(view.used_tuned for view in views.values()):
        return output
    return _with_zero_gradient(output, experts)


class _RowView:
    """The rows of a stack by expert id, whether frozen or tuned."""

    def __init__(self, experts: SplitExperts, stack: str) -> None:
        self.tuned = set(experts.tuned_ids)
        self.used_tuned = False
        self._rows: dict[int, Tensor] = {}
        for ids, part in ((experts.frozen_ids, FROZEN), (experts.tuned_ids, TUNED)):
            rows = experts.rows(stack, part)
            if rows is not None:
                # One unbind, so that the backward pass stacks the rows' gradients once and not per expert.
                self._rows |= dict(zip(ids, rows.unbind(0), strict=True))

    def __getitem__(self, expert: Any) -> Tensor:
        row = int(expert)
        self.used_tuned = self.used_tuned or row in self.tuned
        return self._rows[row]


class _ExpertsProxy:
    """A proxy for the experts module whose stacks are row views, for the family's own forward."""

    def __init__(self, experts: SplitExperts, stacks: dict[str, _RowView]) -> None:
        self._experts, self._stacks = experts, stacks

    def __getattr__(self, name: str) -> Any:
        return self._stacks[name] if name in self._stacks else getattr(self._experts, name)


def _grouped(experts: SplitExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute transformers' `grouped_mm_experts_forward` on two parts: frozen rows first, then tuned ones."""
    tokens, top_k = index.shape
    # Sort as the library does, then move whole experts: within an expert this keeps the order of the library's unstable
    # sort, on which the last bit of a matrix product may depend.
    ids, by_id = torch.sort(index.reshape(-1))
    place, moved = torch.sort(experts.place[ids], stable=True)
    order = by_id[moved]
    counts = torch.histc(place.float(), bins=len(experts.place), min=0, max=len(experts.place) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    inputs = hidden[order // top_k]
    frozen = len(experts.frozen_ids)
    first = int(ends[frozen - 1]) if frozen else 0
    parts = [
        _Part(FROZEN, slice(None, first), place[:first], ends[:frozen]),
        _Part(TUNED, slice(first, None), place[first:] - frozen, ends[frozen:] - first),
    ]
    parts = [part for part in parts if len(part.row)]
    up, down = (name for name in stack_names(experts) if not name.endswith("_bias"))
    middle = _activate(experts, [_linear(experts, up, part, inputs[part.rows]) for part in parts], moved)
    output = torch.cat([_linear(experts, down, part, one) for part, one in zip(parts, middle, strict=True)])
    if experts.has_post_expert_norm:
        output = experts.post_expert_norm(output)  # type: ignore[operator]
    weighted = output * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # Reshape and sum, as the library does: index_add_ is not deterministic on CUDA.
    total = weighted[back].view(tokens, top_k, hidden.size(-1)).sum(dim=1).to(hidden.dtype)
    return total if parts[-1].name == TUNED else _with_zero_gradient(total, experts)


@dataclass(frozen=True)
class _Part:
    """The routed inputs of the frozen or of the tuned experts, sorted by row."""

    name: str
    rows: slice
    """Their range among all inputs."""
    row: Tensor
    """The row of each input's expert in this part."""
    ends: Tensor
    """The end of each expert's inputs."""


def _linear(experts: SplitExperts, stack: str, part: _Part, inputs: Tensor) -> Tensor:
    """Return one part's product of inputs [S, in] with their experts' rows of a stack."""
    weight, bias = experts.rows(stack, part.name), None
    assert weight is not None
    if experts.has_bias:
        biases = experts.rows(f"{stack}_bias", part.name)
        assert biases is not None
        bias = biases[part.row]
    result: Tensor = _grouped_linear(inputs, weight, part.ends, bias=bias, is_transposed=bool(experts.is_transposed))
    return result


def _activate(experts: SplitExperts, parts: list[Tensor], moved: Tensor) -> Sequence[Tensor]:
    """Apply the gate, or the activation if there is none, to each part [S, ...].

    On a CPU it is applied to all inputs at once in the library's order: torch computes the end of a tensor without
    vector instructions, so the last bit depends on an element's position.
    """
    apply: Any = experts._apply_gate if experts.has_gate else experts.act_fn
    if parts[0].device.type != "cpu":
        return [apply(part) for part in parts]
    library = torch.empty_like(moved)
    library[moved] = torch.arange(len(moved))
    joined = apply(torch.cat(parts)[library])[moved]
    return torch.split(joined, [len(part) for part in parts])


def _with_zero_gradient(output: Tensor, experts: SplitExperts) -> Tensor:
    """Return the output with a zero gradient for the trained rows, on which it does not depend."""
    touched: Tensor = _ZeroGradient.apply(output, *experts.tuned_parameters())  # type: ignore[no-untyped-call]
    return touched


class _ZeroGradient(torch.autograd.Function):
    """The identity function, with a zero gradient for weights that the input does not depend on.

    Without it, trained experts that got no tokens would have no gradient, and workers would block in different
    collectives.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return gradients[0], *zeros
