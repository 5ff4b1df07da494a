"""The custom ops that engines call, whatever the backend: opaque to torch.compile, pure in tensors.

`moeq::fused_experts` is a whole MoE layer after its router. `moeq::expert_linear` is half of one,
for models whose gate is their own Python code. `moeq::linear` is a quantized `nn.Linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.oracle import backend_named
from moeq.schemes import OnlineQuantScheme


@torch.library.custom_op("moeq::fused_experts", mutates_args=())
def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    w13_group: Tensor | None,
    w2_group: Tensor | None,
    parts: int,
    scheme: str,
    activation: str,
    backend: str,
) -> Tensor:
    """x [T, H], topk_ids [T, k], topk_weights [T, k] -> [T, H]; the rest as in `ExpertWeights`."""
    weights = ExpertWeights(
        OnlineQuantScheme(scheme),
        w13,
        w13_scale,
        w2,
        w2_scale,
        b13,
        b2,
        w13_group,
        w2_group,
        parts=parts,
    )
    kernels = backend_named(backend).kernels()
    out: Tensor = kernels.fused_experts(x, topk_ids, topk_weights, weights, activation)
    return out


@fused_experts.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    w13_group: Tensor | None,
    w2_group: Tensor | None,
    parts: int,
    scheme: str,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever the strides of x


@torch.library.custom_op("moeq::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    parts: int,
    backend: str,
) -> Tensor:
    """x [T, 1 or k, K], topk_ids [T, k], weight [E, N, code_columns(K)] -> [T, k, N]."""
    kernels = backend_named(backend).kernels()
    out: Tensor = kernels.expert_linear(
        x, topk_ids, weight, scale, group, bias, OnlineQuantScheme(scheme), parts
    )
    return out


@expert_linear.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    parts: int,
    backend: str,
) -> Tensor:
    return x.new_empty((*topk_ids.shape, weight.shape[1]))


@torch.library.custom_op("moeq::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    backend: str,
) -> Tensor:
    """x [..., K], weight [N, code_columns(K)] -> [..., N]."""
    kernels = backend_named(backend).kernels()
    out: Tensor = kernels.linear(x, weight, scale, group, bias, OnlineQuantScheme(scheme))
    return out


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
