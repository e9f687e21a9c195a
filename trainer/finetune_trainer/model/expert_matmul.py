"""Multiply tokens with stacked expert weights in autocast's dtype and without copies of whole stacks.

transformers computes the experts of a mixture with `torch.nn.functional.grouped_mm`. This module changes two
properties that cost time or memory in training:

- `grouped_mm` ignores autocast. With float32 weights it computes in float32, which on a GPU is a loop over the experts
  (torch 2.13 has fast kernels for bfloat16 only). `GROUPED` casts the stacks as autocast casts a linear layer.
- PEFT 0.21 adds LoRA to a stack `W` by computing `W + scaling * B @ A` in each forward pass, twice, and autograd keeps
  the sum for the backward pass: 58 GB for the 48 layers of Qwen3-30B-A3B. `factor_adapters` makes PEFT multiply by `W`,
  `A` and `B` separately, as LoRA does on linear layers (Hu et al., arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper

LIBRARY = "grouped_mm"
"""The experts implementation of transformers that uses the grouped product; its default."""
GROUPED = "grouped_mm_autocast"
"""The experts implementation of this module: the grouped product, which follows autocast."""
RANK_UNIT = 8
"""Ranks are padded to a multiple of this: CUDA's grouped product requires rows of a multiple of 16 bytes."""


def compute_by_autocast(model: PreTrainedModel) -> None:
    """Make a model's experts follow autocast where transformers computes them with its grouped product.

    Families that do not stack their experts are not changed: they use torch's products, which follow autocast.
    """
    if any(is_grouped(module) for module in model.modules()):
        model.set_experts_implementation(GROUPED)


def is_grouped(experts: nn.Module) -> bool:
    """Return whether a module holds stacked experts that are computed by a grouped product."""
    if not hasattr(experts, "_is_expert_parallel"):  # set by transformers' `use_experts_implementation`
        return False
    config: Any = experts.config
    return config._experts_implementation in (LIBRARY, GROUPED)


def _experts_in_autocast(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute transformers' `grouped_mm_experts_forward`, with float32 stacks cast to autocast's dtype if it is on.

    Args:
        hidden: [tokens, hidden].
        index: [tokens, top_k], ids of the chosen experts.
        weights: [tokens, top_k], of the chosen experts.
    """
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return grouped_mm_experts_forward(experts, hidden, index, weights)
    dtype = torch.get_autocast_dtype(kind)
    own = {name: stack for name, stack in experts.named_parameters(recurse=False) if stack.ndim == 3}
    factored = {name: value for name, value in vars(experts).items() if isinstance(value, FactoredStack)}
    wide = {name: stack.to(dtype) for name, stack in (own | factored).items() if stack.dtype == torch.float32}
    with _attributes_replaced(experts, wide):
        return grouped_mm_experts_forward(experts, hidden, index, weights)


ALL_EXPERTS_FUNCTIONS.register(GROUPED, _experts_in_autocast)


@contextmanager
def _attributes_replaced(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Replace attributes of a module inside a `with` block; parameters of the same names are hidden."""
    attributes = vars(module)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            del attributes[name]
        attributes.update(before)


class FactoredStack:
    """A stack `W + scaling * left @ right` [experts, in, out] that a grouped product multiplies by its factors.

    Every other operation gets the sum as a tensor.

    Args:
        left: [experts, in, rank].
        right: [experts, rank, out].
    """

    def __init__(self, stack: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
        self.stack, self.left, self.right, self.scaling = stack, left, right, scaling

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the stack."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the stack."""
        return self.stack.device

    def transpose(self, first: int, second: int) -> FactoredStack | Tensor:
        """Return the stack with two dimensions exchanged."""
        if {first, second} not in ({-1, -2}, {1, 2}):
            return self.whole().transpose(first, second)
        left, right = self.right.transpose(-2, -1), self.left.transpose(-2, -1)
        return FactoredStack(self.stack.transpose(-2, -1), left, right, self.scaling)

    def to(self, dtype: torch.dtype) -> FactoredStack:
        """Return the stack in another dtype."""
        return FactoredStack(self.stack.to(dtype), self.left.to(dtype), self.right.to(dtype), self.scaling)

    def whole(self) -> Tensor:
        """Return the sum."""
        return torch.baddbmm(self.stack, self.left, self.right, alpha=self.scaling)

    def product(self, multiply: Callable[..., Tensor], inputs: Tensor, ends: Tensor) -> Tensor:
        """Return the grouped product of inputs [S, in], sorted by expert, with the stack: [S, out].

        Args:
            multiply: torch's grouped product, or transformers' replacement of it.
            ends: [experts], where each expert's inputs end.
        """
        low = multiply(multiply(inputs, self.left, offs=ends), self.right, offs=ends)
        return multiply(inputs, self.stack, offs=ends).add_(low, alpha=self.scaling)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _grouped_products() and set(options) == {"offs"} and isinstance(args[1], cls):
            return args[1].product(func, args[0], options["offs"])
        return func(*map(_as_tensor, args), **{name: _as_tensor(value) for name, value in options.items()})


def _as_tensor(value: Any) -> Any:
    return value.whole() if isinstance(value, FactoredStack) else value


def _grouped_products() -> tuple[Callable[..., Any], ...]:
    fallback = torch.ops.transformers.grouped_mm_fallback
    return torch._grouped_mm, fallback, fallback.default


def factor_adapters(model: nn.Module) -> None:
    """Compute LoRA on stacked experts by its factors where the experts use grouped products; changes `model` in place.

    The result equals PEFT's `W + scaling * B @ A` except for rounding.
    """
    if "peft" not in sys.modules:  # its import takes seconds, and a model with adapters has imported it
        return
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        if type(module) is ParamWrapper:
            module.__class__ = _factored_wrapper()


@cache
def _factored_wrapper() -> type[ParamWrapper]:
    from peft.tuners.lora.layer import ParamWrapper

    class FactoredWrapper(ParamWrapper):
        """PEFT's LoRA on one stack of weights, computed by its factors."""

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            experts, names = self.get_base_layer(), [name for name in active_adapters if name in self.lora_A]
            if len(names) != 1 or self.num_experts == 1 or not is_grouped(experts):
                with super()._activate_lora(active_adapters):
                    yield
                return
            with _attributes_replaced(experts, {self.parameter_name: _factors(self, names[0])}):
                yield

    return FactoredWrapper


def _factors(wrapper: ParamWrapper, adapter: str) -> FactoredStack:
    """Return the wrapped stack with an adapter, with factors in the layout that CUDA's grouped product requires."""
    left, right, scaling = wrapper.get_delta_factors(adapter)  # type: ignore[no-untyped-call]
    missing = padded_rank(left.shape[-1]) - left.shape[-1]
    if missing:
        left, right = nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))
    stack = wrapper.get_param()  # type: ignore[no-untyped-call]
    return FactoredStack(stack, _contiguous(left), _contiguous(right), float(scaling))


def padded_rank(rank: int) -> int:
    """Return the padded rank with which an adapter on a stack is computed."""
    return -(-rank // RANK_UNIT) * RANK_UNIT


def _contiguous(factor: Tensor) -> Tensor:
    """Return the factor with matrices that are contiguous by rows or by columns."""
    return factor if 1 in factor.stride()[-2:] else factor.contiguous()
