"""What quantized layers are inside a transformers model: its own classes, with our op in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeq.errors import ModelError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.methods.linear import OnlineLinearMethod
from moeq.methods.parameters import has_arranged


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


@contextlib.contextmanager
def order_of_files(model: nn.Module) -> Iterator[None]:
    """Inside it the codes of every quantized layer lie as files have them, to be written or read.
    The model runs all the same, slower where a kernel wants them otherwise."""
    layers: list[tuple[nn.Module, Any]] = [
        (m, m._moeq_method) for m in model.modules() if hasattr(m, "_moeq_method")
    ]
    try:
        for module, method in layers:
            method.restore(module)
        yield
    finally:
        for module, method in layers:
            method.arrange(module)


def _refuse_cast(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """`.to(dtype)` would turn codes and scales into numbers that mean nothing; and other devices
    cannot read codes that are arranged for this one."""
    scale = next(p for n, p in module._parameters.items() if n.endswith("_scale") and p is not None)
    after = fn(torch.empty(0, dtype=scale.dtype, device=scale.device))
    if after.dtype != scale.dtype:
        raise ModelError(
            "the dtype of a quantized model is fixed once it is loaded",
            hint="pass dtype=... where you load it",
        )
    if after.device != scale.device and has_arranged(module):
        raise ModelError(
            f"codes are arranged for {scale.device} kernels, {after.device} cannot read them",
            hint=f"load the model on {after.device}",
        )
