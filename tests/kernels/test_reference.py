"""The ground truth of every kernel, against one written in plain numpy loops that share nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels import reference
from moeq.kernels.activations import ACTIVATIONS
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import e4m3, four_bits

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
ONE = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY

FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Relative to the largest output. fp32: 2^-24 for each of some ten roundings, and an activation's
own error. The others: h and the output are rounded, half an ulp each, and twice that for luck."""


def random_codes(scheme: OnlineQuantScheme, *shape: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of codes, all that there are but NaN and -128."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    if scheme.group is not None:
        return codes
    bad = [0x80] if scheme.weight_dtype == torch.int8 else [0x7F, 0xFF]
    return np.where(np.isin(codes, bad), 0, codes).astype(np.uint8)


def random_groups(scheme: OnlineQuantScheme, *shape: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of group scales: normal numbers, of two octaves and either sign if they have one."""
    if scheme.group_dtype == torch.float8_e8m0fnu:
        return rng.integers(129, 131, shape).astype(np.uint8)
    return (rng.integers(0x48, 0x58, shape) | 128 * rng.integers(0, 2, shape)).astype(np.uint8)


def decoded(scheme: OnlineQuantScheme, codes: np.ndarray) -> np.ndarray:
    if scheme.weight_dtype == torch.int8:
        return codes.view(np.int8).astype(np.float64)
    return e4m3.decode(codes)


def weight_scales(
    scheme: OnlineQuantScheme, e: int, n: int, k: int, parts: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random scales as moeq stores them, and one for every weight [E, N, K]."""
    qmax = {torch.int8: 127, torch.uint8: 64}.get(scheme.weight_dtype, 448)

    def some(*shape: int) -> np.ndarray:
        return (rng.uniform(0.5, 1.5, shape) / qmax / math.sqrt(k)).astype(np.float32)

    if scheme.granularity is Granularity.TENSOR:
        scale = some(e)
        return scale, np.broadcast_to(scale[:, None, None], (e, n, k)).astype(np.float64)
    if scheme.granularity is Granularity.CHANNEL:
        scale = some(e, n)
        return scale, np.broadcast_to(scale[:, :, None], (e, n, k)).astype(np.float64)
    tall = -(-n // parts // 128)
    scale = some(e, parts * tall, -(-k // 128))
    full = np.zeros((e, n, k))
    for row in range(n):
        part, inside = divmod(row, n // parts)
        for column in range(k):
            full[:, row, column] = scale[:, part * tall + inside // 128, column // 128]
    return scale, full


def quantized_row(scheme: OnlineQuantScheme, row: np.ndarray) -> np.ndarray:
    """A row of activations as the kernel sees it."""
    if not scheme.quantizes_activations:
        return row
    width = 128 if scheme.granularity is Granularity.BLOCK else len(row)
    int8 = scheme.weight_dtype == torch.int8
    qmax = np.float32(127 if int8 else 448)
    seen = np.zeros(len(row))
    for start in range(0, len(row), width):
        group = row[start : start + width].astype(np.float32)
        scale = np.abs(group).max() / qmax if group.any() else np.float32(1)
        quotient = np.clip(group / scale, -qmax, qmax)
        codes = np.rint(quotient) if int8 else e4m3.decode(e4m3.encode(quotient))
        seen[start : start + width] = codes.astype(np.float64) * scale
    return seen


def experts(
    scheme: OnlineQuantScheme, e: int, h: int, i: int, parts: int, has_bias: bool, seed: int = 0
) -> tuple[ExpertWeights, dict[str, np.ndarray]]:
    """Weights for the reference, and the same as fp64 arrays."""
    rng = np.random.default_rng(seed)
    fields: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, n, k, stacked in (("w13", parts * i, h, parts), ("w2", h, i, 1)):
        count = -(-k // 32)
        columns = k if scheme.group is None else 16 * count
        codes = random_codes(scheme, e, n, columns, rng=rng)
        scale, full = weight_scales(scheme, e, n, k, stacked, rng)
        fields[name] = torch.from_numpy(codes).view(scheme.weight_dtype)
        fields[f"{name}_scale"] = torch.from_numpy(scale)
        if scheme.group is None:
            arrays[name] = decoded(scheme, codes) * full
        else:  # what fills rows up is random too: nobody may read it
            groups = random_groups(scheme, e, n, count, rng=rng)
            group = torch.from_numpy(groups).view(scheme.group_dtype)
            fields[f"{name}_group"] = group
            arrays[name] = four_bits.decode(scheme, codes, groups)[..., :k] * full
        bias = rng.normal(size=(e, n)).astype(np.float32) * has_bias
        arrays[name.replace("w", "b")] = bias.astype(np.float64)
        if has_bias:
            fields[name.replace("w", "b")] = torch.from_numpy(bias)
    return ExpertWeights(scheme, **fields, parts=parts), arrays


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).float().to(dtype).double().numpy()


def layer_by_hand(
    scheme: OnlineQuantScheme,
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    arrays: dict[str, np.ndarray],
    activation: str,
) -> np.ndarray:
    """One MoE layer, a token and an expert at a time, in fp64."""
    num_experts, _, intermediate = arrays["w2"].shape
    out = np.zeros(x.shape)
    for t, row in enumerate(x.double().numpy()):
        for expert, weight in zip(ids[t].tolist(), topk_weights[t].tolist(), strict=True):
            if not 0 <= expert < num_experts:
                continue
            h13 = arrays["w13"][expert] @ quantized_row(scheme, row) + arrays["b13"][expert]
            h = FORMULAS[activation](h13[:intermediate])
            if len(h13) == 2 * intermediate:
                h = h * h13[intermediate:]
            h = rounded(h, x.dtype)  # because that is what it is stored as
            y = arrays["w2"][expert] @ quantized_row(scheme, h) + arrays["b2"][expert]
            out[t] += weight * y
    return out


def inputs(tokens: int, h: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, h, generator=generator).to(dtype)


def assert_close(found: Tensor, expected: np.ndarray) -> None:
    limit = TOLERANCE[found.dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=limit)


@EVERY_SCHEME
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("parts", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_layer_equals_plain_loops(
    scheme: OnlineQuantScheme, dtype: torch.dtype, parts: int, has_bias: bool
) -> None:
    weights, arrays = experts(scheme, 5, 140, 150, parts, has_bias)  # no block divides these
    x = inputs(4, 140, dtype)
    x[3] = 0
    ids = torch.tensor([[0, 2], [2, 3], [5, 0], [3, -1]])  # 1 and 4 idle, 5 and -1 of other ranks
    topk_weights = torch.tensor([[0.75, 0.25], [0.5, 0.125], [9.0, 0.5], [1.0, 9.0]])
    found = reference.fused_experts(x, ids, topk_weights, weights, "silu")
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert_close(found, layer_by_hand(scheme, x, ids, topk_weights, arrays, "silu"))


@pytest.mark.parametrize("parts", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_equal_their_formulas(activation: str, parts: int) -> None:
    weights, arrays = experts(ONE, 2, 20, 12, parts, has_bias=True)
    x, ids, topk_weights = (
        inputs(3, 20, torch.float32),
        torch.tensor([[0], [1], [0]]),
        torch.ones(3, 1),
    )
    found = reference.fused_experts(x, ids, topk_weights, weights, activation)
    assert_close(found, layer_by_hand(ONE, x, ids, topk_weights, arrays, activation))


def test_every_activation_has_a_formula_here() -> None:
    assert sorted(ACTIVATIONS) == sorted(FORMULAS)


@pytest.mark.parametrize("scheme", [s for s in OnlineQuantScheme if s.covers("linear")], ids=str)
def test_products_of_codes_are_added_exactly(scheme: OnlineQuantScheme) -> None:
    k = 2048
    group = None
    if scheme.group is not None:
        is_int4 = scheme is OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
        one, most = (9, 15) if is_int4 else (2, 7)  # 7 and 6
        x, weight = torch.full((1, k), 2.0**-9), torch.full((1, k // 2), one * 17)
        x[0, ::32] = torch.tensor([448.0, -448.0]).repeat(32)
        weight[0, ::16] = most + one * 16
        group = torch.ones(1, k // 32).to(scheme.group_dtype)
        exact = (k - 64) * 2.0**-9
    elif scheme.weight_dtype == torch.int8:
        x, weight = torch.full((1, k), 127.0), torch.full((1, k), 127.0)
        weight[0, 0] = 1
        exact = 127 + 127 * 127 * (k - 1)  # 25 bits: sums in fp32 drop the last
    else:
        x, weight = torch.full((1, k), 2.0**-9), torch.ones(1, k)
        x[0, ::128] = torch.tensor([448.0, -448.0]).repeat(8)
        weight[0, ::128] = 448
        exact = (k - 16) * 2.0**-9  # the large ones cancel; beside them fp32 drops the small ones
    ones = {
        Granularity.TENSOR: torch.ones(()),
        Granularity.CHANNEL: torch.ones(1),
        Granularity.BLOCK: torch.ones(1, 16),
    }[scheme.granularity]
    found = reference.linear(x, weight.to(scheme.weight_dtype), ones, group, None, scheme)
    assert found.item() == exact


@EVERY_SCHEME
@pytest.mark.parametrize("each", [False, True], ids=["one row", "k rows"])
def test_half_a_layer_equals_plain_loops(scheme: OnlineQuantScheme, each: bool) -> None:
    weights, arrays = experts(scheme, 3, 140, 150, 2, has_bias=True)
    ids = torch.tensor([[0, 2], [3, 0], [-1, -7]])
    x = inputs(6, 140, torch.float32).view(3, 2, 140)
    x = x if each else x[:, :1]
    found = reference.expert_linear(
        x, ids, weights.w13, weights.w13_scale, weights.w13_group, weights.b13, scheme, parts=2
    )
    expected = np.zeros((3, 2, 300))
    for t, slot in ((0, 0), (0, 1), (1, 1)):
        expert = int(ids[t, slot])
        row = quantized_row(scheme, x[t, slot if each else 0].double().numpy())
        expected[t, slot] = arrays["w13"][expert] @ row + arrays["b13"][expert]
    assert_close(found, expected)
    assert bool((found[1, 0] == 0).all())  # not even a bias
    assert bool((found[2] == 0).all())


@pytest.mark.parametrize("scheme", [s for s in OnlineQuantScheme if s.covers("linear")], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_a_linear_equals_plain_loops(
    scheme: OnlineQuantScheme, dtype: torch.dtype, has_bias: bool
) -> None:
    weights, arrays = experts(scheme, 1, 150, 140, 1, has_bias)
    x = inputs(6, 140, dtype).view(2, 3, 140)
    bias = None if weights.b2 is None else weights.b2[0]
    group = None if weights.w2_group is None else weights.w2_group[0]
    found = reference.linear(x, weights.w2[0], weights.w2_scale[0], group, bias, scheme)
    assert (found.shape, found.dtype) == ((2, 3, 150), dtype)
    expected = np.zeros((2, 3, 150))
    for at in np.ndindex(2, 3):
        row = quantized_row(scheme, x[at].double().numpy())
        expected[at] = arrays["w2"][0] @ row + arrays["b2"][0]
    assert_close(found, expected)


@EVERY_SCHEME
def test_no_tokens_and_no_expert_of_ours(scheme: OnlineQuantScheme) -> None:
    weights, _ = experts(scheme, 2, 20, 12, 2, has_bias=True)
    nothing = reference.fused_experts(
        torch.empty(0, 20), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), weights, "silu"
    )
    assert nothing.shape == (0, 20)
    ids = torch.full((3, 2), 2)
    foreign = reference.fused_experts(
        inputs(3, 20, torch.bfloat16), ids, torch.ones(3, 2), weights, "silu"
    )
    assert torch.equal(foreign, torch.zeros(3, 20, dtype=torch.bfloat16))
