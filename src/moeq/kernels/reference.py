"""The ground truth of every kernel: slow, in fp64 where it matters, and short enough to check.

    h13 = x @ dequantize(w13).T + b13          rows of x are quantized first where the scheme says
    h   = act(gate) * up                       act(up) without a gate
    y   = h @ dequantize(w2).T + b2            rows of h likewise
    out = sum over the k experts of a token of topk_weight * y

Matrix products accumulate in fp64, so integer codes multiply exactly; everything between is fp32.
`h` is rounded to the dtype of x before the down projection because that is what it is stored as.

Runs on any device and under every scheme. Legend: see `moeq.experts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels.activations import ACTIVATIONS
from moeq.quantize import dequantize, quantize_activations
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activation: str,
) -> Tensor:
    """One MoE layer after its router.

    Args:
        x: [T, H], fp16, bf16 or fp32.
        topk_ids: [T, k] integer. An id < 0 or >= E belongs to another rank and adds nothing.
        topk_weights: [T, k], floating.
        weights: of the E experts held here.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, H] in the dtype of x.
    """
    scheme, parts = weights.scheme, weights.parts
    w13 = (weights.w13, weights.w13_scale, weights.w13_group)
    w2 = (weights.w2, weights.w2_scale, weights.w2_group)
    h13 = _expert_linear_fp32(x[:, None], topk_ids, *w13, weights.b13, scheme, parts)
    act = ACTIVATIONS[activation]
    if weights.is_gated:
        gate, up = h13.chunk(2, dim=-1)
        h = act(gate) * up
    else:
        h = act(h13)
    y = _expert_linear_fp32(h.to(x.dtype), topk_ids, *w2, weights.b2, scheme, 1)
    local = (topk_ids >= 0) & (topk_ids < weights.num_experts)
    weighted = y * topk_weights.float()[..., None]
    return torch.where(local[..., None], weighted, 0).sum(1).to(x.dtype)


def expert_linear(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    """One projection of the chosen experts: half a layer, for gates that only their model knows.

    Args:
        x: [T, j, K]; j is k, or 1 where the k experts of a token see the same row.
        topk_ids: [T, k] integer; ids outside 0..E-1 give rows of zeros.
        weight: codes [E, N, code_columns(K)].
        scale: fp32, `scale_shape(scheme.granularity, [E, N, K], parts)`.
        group: `scheme.group_dtype`, `group_shape(scheme, [E, N, K])`, or None.
        bias: [E, N] or None.
        scheme: what the codes mean.
        parts: projections stacked along N.

    Returns:
        [T, k, N] in the dtype of x.
    """
    return _expert_linear_fp32(x, topk_ids, weight, scale, group, bias, scheme, parts).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
) -> Tensor:
    """A quantized `nn.Linear`: x [..., K], codes of [N, K], bias [N] or None -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    y = _matmul(rows, weight, scale, group, scheme, parts=1)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _expert_linear_fp32(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    t, k = topk_ids.shape
    num_experts, n, _ = weight.shape
    x = x.expand(t, k, x.shape[-1])
    out = torch.zeros(t, k, n, dtype=torch.float32, device=x.device)
    for expert in range(num_experts):
        here = topk_ids == expert
        if not bool(here.any()):
            continue
        mine = None if group is None else group[expert]
        y = _matmul(x[here], weight[expert], scale[expert], mine, scheme, parts)
        out[here] = y if bias is None else y + bias[expert].float()
    return out


def _matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    """[M, K] x codes of [N, K] -> fp32 [M, N]."""
    weight = dequantize(
        codes,
        scale,
        scheme.granularity,
        parts=parts,
        dtype=torch.float64,
        group_scale=group,
        columns=x.shape[-1],
    )
    if scheme.quantizes_activations:
        x_codes, x_scale = quantize_activations(x, scheme)
        if scheme.granularity is Granularity.BLOCK:
            x_scale = x_scale.repeat_interleave(BLOCK, dim=-1)[:, : x.shape[-1]]
        x = x_codes.double() * x_scale
    return (x.double() @ weight.T).float()
