"""What becomes of codes and scales: dequantized weights, and activations that are quantized too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeq.quantize import amax, dequantize, quantize, quantize_activations, scale_from_amax
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import e4m3

INT8, FP8 = torch.int8, torch.float8_e4m3fn
SCHEMES_WITH_ACTIVATIONS = [s for s in OnlineQuantScheme if s.quantizes_activations]
EVERY_ACTIVATION = pytest.mark.parametrize(
    "scheme", SCHEMES_WITH_ACTIVATIONS, ids=lambda scheme: scheme.value
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    weight: Tensor, dtype: torch.dtype, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    scale = scale_from_amax(amax(weight, granularity), dtype)
    return quantize(weight, scale, dtype, granularity), scale


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("granularity", Granularity, ids=lambda g: g.name)
def test_dequantize_is_code_times_scale(granularity: Granularity, dtype: torch.dtype) -> None:
    codes, scale = quantized(randn(2, 131, 257), dtype, granularity)
    found = dequantize(codes, scale, granularity)
    assert found.dtype == torch.float32
    index = {
        Granularity.TENSOR: lambda e, n, k: (e,),
        Granularity.CHANNEL: lambda e, n, k: (e, n),
        Granularity.BLOCK: lambda e, n, k: (e, n // 128, k // 128),
    }[granularity]
    for e, n, k in [(0, 0, 0), (1, 127, 128), (0, 128, 127), (1, 130, 256), (0, 128, 255)]:
        assert found[e, n, k] == codes[e, n, k].float() * scale[index(e, n, k)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_rounds_once_from_fp32(dtype: torch.dtype) -> None:
    codes, scale = quantized(randn(9, 20), INT8, Granularity.CHANNEL)
    found = dequantize(codes, scale, Granularity.CHANNEL, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, (codes.float() * scale[:, None]).to(dtype))


def test_dequantize_of_no_experts_is_empty() -> None:
    codes, scale = torch.empty(0, 4, 6, dtype=INT8), torch.empty(0, 4)
    found = dequantize(codes, scale, Granularity.CHANNEL, dtype=torch.bfloat16)
    assert (found.shape, found.dtype) == ((0, 4, 6), torch.bfloat16)


@pytest.mark.parametrize("intermediate", [128, 130, 7])
@pytest.mark.parametrize("granularity", Granularity, ids=lambda g: g.name)
def test_gate_and_up_have_block_grids_of_their_own(
    granularity: Granularity, intermediate: int
) -> None:
    gate, up = randn(2, intermediate, 140), 1000 * randn(2, intermediate, 140, seed=1)
    if granularity is Granularity.TENSOR:
        up = gate.flip(-1)  # the two share a scale there
    pairs = [quantized(weight, FP8, granularity) for weight in (gate, up)]
    codes = torch.cat([pair[0].view(torch.uint8) for pair in pairs], dim=1).view(FP8)
    scales = [pair[1] for pair in pairs]
    scale = scales[0] if granularity is Granularity.TENSOR else torch.cat(scales, dim=1)
    whole = dequantize(codes, scale, granularity, parts=2)
    apart = [dequantize(*pair, granularity) for pair in pairs]
    assert torch.equal(whole, torch.cat(apart, dim=1))


def per_column(scale: Tensor, scheme: OnlineQuantScheme, k: int) -> Tensor:
    """fp64 scale of every activation [T, K]."""
    if scheme.granularity is Granularity.BLOCK:
        return scale.double()[:, torch.arange(k) // 128]
    return scale.double().expand(-1, k)


@EVERY_ACTIVATION
@settings(max_examples=15)
@given(
    tokens=st.integers(1, 9),
    k=st.integers(1, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_activations_are_off_by_at_most_half_a_step(
    scheme: OnlineQuantScheme, tokens: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    x = (randn(tokens, k, seed=seed) * randn(tokens, 1, seed=seed + 1).mul(3).exp()).to(dtype)
    codes, scale = quantize_activations(x, scheme)
    assert (codes.dtype, codes.shape) == (scheme.weight_dtype, x.shape)
    groups = -(-k // 128) if scheme.granularity is Granularity.BLOCK else 1
    assert (scale.dtype, scale.shape) == (torch.float32, (tokens, groups))
    step = per_column(scale, scheme, k)
    quotient = x.double() / step
    spacing = torch.ones_like(quotient)
    if scheme.weight_dtype == FP8:
        spacing = torch.from_numpy(e4m3.spacing(quotient.clamp(-448, 448).numpy()))
    error = (codes.double() * step - x.double()).abs()
    # Beyond half a step, scale and quotient are rounded once each, to 2^-24 of themselves.
    assert bool((error <= step * (0.5 * spacing + quotient.abs() * 2**-23)).all())


@EVERY_ACTIVATION
def test_activation_scales_see_their_own_token_and_columns_only(
    scheme: OnlineQuantScheme,
) -> None:
    x = randn(4, 300)
    codes, scale = quantize_activations(x, scheme)
    louder = x.clone()
    louder[2, 290] = 1e4
    louder_codes, louder_scale = quantize_activations(louder, scheme)
    changed = (louder_scale != scale).nonzero().tolist()
    assert changed == [[2, scale.shape[1] - 1]]
    untouched = torch.ones(4, 300, dtype=torch.bool)
    untouched[2, 256 if scheme.granularity is Granularity.BLOCK else 0 :] = False
    assert torch.equal(codes.float()[untouched], louder_codes.float()[untouched])


@EVERY_ACTIVATION
def test_a_token_of_zeros_gets_scale_one_and_codes_of_zero(scheme: OnlineQuantScheme) -> None:
    x = randn(3, 200).bfloat16()
    x[1] = 0
    codes, scale = quantize_activations(x, scheme)
    assert bool((scale[1] == 1).all())
    assert bool((codes[1].float() == 0).all())
    assert bool((codes[0].float() != 0).any())


@EVERY_ACTIVATION
def test_no_tokens_give_no_codes(scheme: OnlineQuantScheme) -> None:
    codes, scale = quantize_activations(torch.empty(0, 200), scheme)
    assert codes.shape == (0, 200)
    assert scale.shape == (0, 2 if scheme.granularity is Granularity.BLOCK else 1)


def test_weight_only_schemes_do_not_touch_activations() -> None:
    with pytest.raises(AssertionError, match="WEIGHT_ONLY"):
        quantize_activations(randn(2, 4), OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY)
