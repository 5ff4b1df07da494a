"""What quantized layers are inside a transformers model: its own classes, with our op in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeq.errors import ModelError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose weight is codes and scales."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it acts, dequantized: for model code that reads it instead of calling."""
        method: OnlineLinearMethod = self._moeq_method  # type: ignore[assignment]
        return method.dequantized(self)

    def forward(self, x: Tensor) -> Tensor:
        method: OnlineLinearMethod = self._moeq_method  # type: ignore[assignment]
        return method.apply(self, x, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        _refuse_cast(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


_EXPERTS_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def experts_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a model's experts class that runs our op; keeps its gate, limits and norms."""

    def forward(
        self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        method: OnlineMoEMethodBase = self._moeq_method
        return method.apply(self, hidden_states, top_k_index, top_k_weights)

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        _refuse_cast(self, fn)
        return base._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    if base not in _EXPERTS_CLASSES:
        namespace = {"forward": forward, "_apply": _apply}
        _EXPERTS_CLASSES[base] = type(f"Quantized{base.__name__}", (base,), namespace)
    return _EXPERTS_CLASSES[base]


def _refuse_cast(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """`.to(dtype)` would turn codes and scales into numbers that mean nothing."""
    scale = next(p for n, p in module._parameters.items() if n.endswith("_scale") and p is not None)
    if fn(torch.empty(0, dtype=scale.dtype, device=scale.device)).dtype != scale.dtype:
        raise ModelError(
            "the dtype of a quantized model is fixed once it is loaded",
            hint="pass dtype=... where you load it",
        )
