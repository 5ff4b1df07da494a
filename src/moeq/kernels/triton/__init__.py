"""Experts and linears on NVIDIA GPUs, in Triton: the functions that every backend has.

`plans` decides from the number of tokens how a layer is cut; `layer` launches it. Read `layer`
first, then `gemm` (the product), `routing` and `gemv`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeq.schemes import OnlineQuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from moeq.experts import ExpertWeights


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activation: str,
) -> Tensor:
    """One MoE layer after its router.

    Args:
        x: [T, H], fp16 or bf16.
        topk_ids: [T, k] integer. An id < 0 or >= E belongs to another rank and adds nothing.
        topk_weights: [T, k], floating.
        weights: of the E experts held here.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, H] in the dtype of x, the same bits from run to run.
    """
    from moeq.kernels.triton import layer, plans

    t, k = topk_ids.shape
    if t * k * weights.num_experts == 0:
        return x.new_zeros(x.shape)
    arithmetic = plans.arithmetic(x.device, weights.scheme)
    e, h = weights.num_experts, weights.hidden_size
    shape = (t, k, e, h, weights.intermediate_size)
    path = plans.choose(x.device, weights.scheme, x.dtype, shape)
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), _ids(topk_ids)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return layer.fused_experts(x, topk_ids, topk_weights, weights, activation, path, arithmetic)


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
    from moeq.kernels.triton import layer, plans
    from moeq.kernels.triton.routing import route

    (t, k), j = topk_ids.shape, x.shape[1]
    (e, n, _), depth = weight.shape, x.shape[2]
    if t * k * e == 0:
        return x.new_zeros(t, k, n)
    arithmetic = plans.arithmetic(x.device, scheme)
    w = layer.Projection(scheme, weight, scale, group, bias, parts, depth)
    ids = _ids(topk_ids)
    rows = x.reshape(t * j, depth).contiguous()
    path = plans.choose(x.device, scheme, x.dtype, (t, k, e, n // parts, depth), library=False)
    with torch.cuda.device_of(x):
        a, a_scale = layer.quantized(rows, w, arithmetic, pdl=False)
        if isinstance(path, layer.GemvPath):
            out = x.new_empty(t * k, n)
            layer.gemv_up(a, a_scale, ids, w, out, "", path.up, arithmetic, pdl=a is not rows)
            return out.view(t, k, n)
        assert isinstance(path, layer.GemmPath)
        out = x.new_zeros(t * k, n)
        routing = route(ids, e, path.block_m, pdl=arithmetic.pdl)
        config = path.up if parts == 2 else path.down
        layer.run_gemm(
            a, a_scale, routing, w, out, "", k, path.block_m, config, arithmetic,
            x_rows="pair" if j == k else "token", out_rows="pair",
        )  # fmt: skip
    return out.view(t, k, n)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
) -> Tensor:
    """A quantized `nn.Linear`: x [..., K], codes of [N, K], bias [N] or None -> [..., N]."""
    from moeq.kernels.triton import layer, plans

    n, depth = weight.shape[0], x.shape[-1]
    rows = x.reshape(-1, depth).contiguous()
    out = x.new_empty(len(rows), n)
    if len(rows) == 0:
        return out.view(*x.shape[:-1], n)
    arithmetic = plans.arithmetic(x.device, scheme)
    groups, biases = (None if tensor is None else tensor[None] for tensor in (group, bias))
    w = layer.Projection(scheme, weight[None], scale[None], groups, biases, 1, depth)
    path = plans.choose(x.device, scheme, x.dtype, (len(rows), 1, 1, n, depth), library=False)
    with torch.cuda.device_of(x):
        a, a_scale = layer.quantized(rows, w, arithmetic, pdl=False)
        if isinstance(path, layer.GemvPath):
            layer.gemv_up(a, a_scale, None, w, out, "", path.up, arithmetic, pdl=a is not rows)
        else:
            assert isinstance(path, layer.GemmPath)
            layer.run_gemm(
                a, a_scale, None, w, out, "", 1, path.block_m, path.down, arithmetic,
                x_rows="sorted", out_rows="sorted",
            )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def _ids(topk_ids: Tensor) -> Tensor:
    """Contiguous, and of a type that has room for -1."""
    signed = topk_ids.dtype in (torch.int32, torch.int64)
    return (topk_ids if signed else topk_ids.to(torch.int64)).contiguous()
