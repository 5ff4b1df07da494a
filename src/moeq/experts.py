"""The quantized weights of one MoE layer, in the one layout that kernels see.

Legend: E experts (of this rank), H hidden size, I intermediate size, N rows and K columns of one
matrix, T tokens, k experts per token.

Whatever the checkpoint and the model's module look like (per expert or fused, transposed,
gate and up interleaved), weights are stored as

    w13 [E, 2I, H]   gate rows, then up rows, of every expert ([E, I, H] where there is no gate)
    w2  [E, H, I]    down

with codes contiguous along K, so that a kernel has one case to be fast for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme


def blocks(n: int) -> int:
    """How many 128-wide blocks cover `n` rows or columns; the last may be partial."""
    return -(-n // BLOCK)


def scale_shape(
    granularity: Granularity, shape: tuple[int, ...], parts: int = 1
) -> tuple[int, ...]:
    """Shape of the scales of weights `[..., N, K]` made of `parts` projections stacked along N.

    TENSOR `[...]`; CHANNEL `[..., N]`; BLOCK `[..., parts * ceil(N / parts / 128), ceil(K / 128)]`:
    every projection has its own grid of blocks, so that gate and up never share one.
    """
    *lead, n, k = shape
    match granularity:
        case Granularity.TENSOR:
            return tuple(lead)
        case Granularity.CHANNEL:
            return (*lead, n)
        case Granularity.BLOCK:
            return (*lead, parts * blocks(n // parts), blocks(k))


@dataclass(frozen=True)
class ExpertWeights:
    """Codes, scales and biases of one MoE layer.

    Attributes:
        scheme: what the codes mean.
        w13: codes [E, P * I, H] in `scheme.weight_dtype`; P = 2 (gate, then up) or 1 (up alone).
        w13_scale: fp32, `scale_shape(granularity, w13.shape, parts=P)`. Under TENSOR gate and up
            share the one scale of their expert.
        w2: codes [E, H, I].
        w2_scale: fp32, `scale_shape(granularity, w2.shape)`.
        b13: bias [E, P * I] in the model's dtype, gate then up, or None.
        b2: bias [E, H], or None.
    """

    scheme: OnlineQuantScheme
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    b13: Tensor | None = None
    b2: Tensor | None = None

    def __post_init__(self) -> None:
        e, n, h = self.w13.shape
        i = self.w2.shape[2]
        assert n in (i, 2 * i), (self.w13.shape, self.w2.shape)
        assert self.w2.shape == (e, h, i), (self.w13.shape, self.w2.shape)
        for name, weight, scale, parts in (
            ("w13", self.w13, self.w13_scale, self.parts),
            ("w2", self.w2, self.w2_scale, 1),
        ):
            assert weight.dtype == self.scheme.weight_dtype, (name, weight.dtype)
            want = scale_shape(self.scheme.granularity, tuple(weight.shape), parts)
            assert tuple(scale.shape) == want, (name, scale.shape, want)
            assert scale.dtype == torch.float32, (name, scale.dtype)
            assert scale.device == weight.device, (name, scale.device, weight.device)
        assert self.b13 is None or self.b13.shape == (e, n), self.b13.shape
        assert self.b2 is None or self.b2.shape == (e, h), self.b2.shape

    @property
    def num_experts(self) -> int:
        """Experts held here: the local ones under expert parallelism."""
        return self.w13.shape[0]

    @property
    def parts(self) -> int:
        """Projections stacked in w13: 2 with a gate, 1 without."""
        return self.w13.shape[1] // self.w2.shape[2]

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds a gate beside up."""
        return self.parts == 2
