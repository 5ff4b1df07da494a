"""Random MoE layers, already quantized, for tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moeq.experts import ExpertWeights, scale_shape
from moeq.kernels import reference
from moeq.kernels.activations import ACTIVATIONS
from moeq.quantize import dequantize
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


def truth(
    x: Tensor, ids: Tensor, topk_weights: Tensor, w: ExpertWeights, activation: str
) -> Tensor:
    """fp64 [T, H], one row at a time; activations as they are, but for W8A8."""
    if w.scheme is OnlineQuantScheme.INT8_PER_CHANNEL:
        return reference.fused_experts(x, ids, topk_weights, w, activation).double()
    grain, out = w.scheme.granularity, torch.zeros(x.shape, dtype=torch.float64)
    w13 = dequantize(w.w13, w.w13_scale, grain, parts=w.parts, dtype=torch.float64)
    w2 = dequantize(w.w2, w.w2_scale, grain, dtype=torch.float64)
    for t, slot in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])):
        e = int(ids[t, slot])
        if not 0 <= e < w.num_experts:
            continue
        h13 = w13[e] @ x[t].double()
        if w.b13 is not None:
            h13 += w.b13[e]
        gate, up = h13.chunk(2) if w.is_gated else (h13, 1)
        y = w2[e] @ (ACTIVATIONS[activation](gate) * up)
        if w.b2 is not None:
            y += w.b2[e]
        out[t] += topk_weights[t, slot] * y
    return out
