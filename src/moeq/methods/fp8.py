"""fp8 (e4m3fn) experts, by what shares a scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moeq.methods.base import OnlineMoEMethodBase, Projection
from moeq.methods.matrices import matrix_amax, quantize_under
from moeq.schemes import OnlineQuantScheme


class Fp8PerChannelOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per output row."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_CHANNEL


class Fp8PerBlockOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per 128 x 128 block; gate and up have grids of their own."""

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_BLOCK


class Fp8PerTensorOnlineMoEMethod(OnlineMoEMethodBase):
    """One scale per matrix. Gate and up are one matrix to a fused kernel, so they share theirs.

    The first of the two to arrive waits, unquantized, for the other: the one place where more than
    one projection is in flight. Checkpoints store them side by side, so it is one pair at a time.
    """

    scheme: ClassVar[OnlineQuantScheme] = OnlineQuantScheme.FP8_PER_TENSOR

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__(backend=backend)
        self._first: dict[int, tuple[Projection, Tensor, Tensor]] = {}

    def _quantize(
        self, layer: nn.Module, expert: int, projection: Projection, weight: Tensor, name: str
    ) -> None:
        if projection == "down" or not self._is_gated:
            super()._quantize(layer, expert, projection, weight, name)
            return
        _, scale = self._views(layer, expert, projection)
        weight = weight.to(scale.device).contiguous()
        amax = matrix_amax(weight, name)
        if expert not in self._first:
            self._first[expert] = (projection, weight.clone(), amax)
            return
        other, other_weight, other_amax = self._first.pop(expert)
        shared = torch.maximum(amax, other_amax)
        for part, matrix in ((other, other_weight), (projection, weight)):
            codes, _ = self._views(layer, expert, part)
            quantize_under(matrix, shared, codes, scale)
