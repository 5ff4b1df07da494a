"""Random MoE layers, already quantized, for tests of kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeq.experts import ExpertWeights, code_columns, group_shape, scale_shape
from moeq.kernels import reference
from moeq.kernels.activations import ACTIVATIONS
from moeq.quantize import dequantize
from moeq.schemes import OnlineQuantScheme
from tests import four_bits


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
        if scheme.group is not None:
            width = code_columns(scheme, shape[-1])
            packed = torch.randint(0, 256, (*shape[:-1], width), dtype=torch.uint8)
            # What fills a row up means zero
            nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
            nibbles[..., shape[-1] :] = four_bits.ZERO[scheme]
            return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        if scheme.weight_dtype == torch.int8:
            return torch.randint(-160, 161, shape).clamp_(-127, 127).to(torch.int8)
        raw = torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)  # no NaN: 127, 255
        return raw.to(torch.uint8).view(torch.float8_e4m3fn)

    def groups(*shape: int) -> Tensor | None:
        found = group_shape(scheme, shape)
        if found is None:
            return None
        if scheme is OnlineQuantScheme.MXFP4_WEIGHT_ONLY:
            return torch.randint(128, 137, found).to(torch.uint8).view(scheme.group_dtype)
        magnitude = torch.randint(four_bits.LEAST[scheme], 127, found)
        sign = torch.randint(0, 2, found) * 128
        return (magnitude + sign).to(torch.uint8).view(torch.float8_e4m3fn)

    def scales(shape: tuple[int, ...], parts: int) -> Tensor:
        if scheme.group is not None:
            return torch.exp2(torch.randint(-13, -10, shape[:-1]) - round(math.log2(shape[-1]) / 2))
        size = 1 / (70 if scheme.weight_dtype == torch.int8 else 100) / shape[-1] ** 0.5
        return (torch.rand(scale_shape(scheme.granularity, shape, parts)) + 0.5) * size

    parts = 2 if gated else 1
    up, down = (e, parts * i, h), (e, h, i)
    return ExpertWeights(
        scheme,
        codes(*up),
        scales(up, parts),
        codes(*down),
        scales(down, 1),
        None if bias is None else torch.randn(e, parts * i).to(bias),
        None if bias is None else torch.randn(e, h).to(bias),
        groups(*up),
        groups(*down),
        parts=parts,
    )


def route(t: int, k: int, e: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for every token, and weights that sum to 1."""
    ids = torch.rand(t, e).argsort(dim=1)[:, :k]
    return ids, torch.rand(t, k).softmax(-1)


def dequantized(w: ExpertWeights) -> tuple[Tensor, Tensor]:
    """fp64 [E, P * I, H] and [E, H, I]."""
    grain, exact = w.scheme.granularity, torch.float64
    return (
        dequantize(
            w.w13,
            w.w13_scale,
            grain,
            parts=w.parts,
            dtype=exact,
            group_scale=w.w13_group,
            columns=w.hidden_size,
        ),
        dequantize(
            w.w2,
            w.w2_scale,
            grain,
            dtype=exact,
            group_scale=w.w2_group,
            columns=w.intermediate_size,
        ),
    )


def truth(
    x: Tensor, ids: Tensor, topk_weights: Tensor, w: ExpertWeights, activation: str
) -> Tensor:
    """fp64 [T, H], one row at a time; activations as they are, but for W8A8."""
    if w.scheme is OnlineQuantScheme.INT8_PER_CHANNEL:
        return reference.fused_experts(x, ids, topk_weights, w, activation).double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    w13, w2 = dequantized(w)
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
