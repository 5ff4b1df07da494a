"""Random MoE layers, already quantized, for tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moeq.experts import ExpertWeights, scale_shape
from moeq.schemes import OnlineQuantScheme


def random_weights(
    scheme: OnlineQuantScheme,
    e: int,
    h: int,
    i: int,
    *,
    gated: bool = True,
    bias: torch.dtype | None = None,
) -> ExpertWeights:
    """Every code that there is, the largest often enough to saturate what saturates."""

    def codes(*shape: int) -> Tensor:
        if scheme.weight_dtype == torch.int8:
            return torch.randint(-160, 161, shape).clamp_(-127, 127).to(torch.int8)
        raw = torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)  # no NaN: 127, 255
        return raw.to(torch.uint8).view(torch.float8_e4m3fn)

    def scales(shape: tuple[int, ...], parts: int) -> Tensor:
        size = 1 / (70 if scheme.weight_dtype == torch.int8 else 100) / shape[-1] ** 0.5
        return (torch.rand(scale_shape(scheme.granularity, shape, parts)) + 0.5) * size

    parts = 2 if gated else 1
    w13, w2 = codes(e, parts * i, h), codes(e, h, i)
    return ExpertWeights(
        scheme,
        w13,
        scales(tuple(w13.shape), parts),
        w2,
        scales(tuple(w2.shape), 1),
        None if bias is None else torch.randn(e, parts * i).to(bias),
        None if bias is None else torch.randn(e, h).to(bias),
    )


def route(t: int, k: int, e: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for every token, and weights that sum to 1."""
    ids = torch.rand(t, e).argsort(dim=1)[:, :k]
    return ids, torch.rand(t, k).softmax(-1)
