"""What holds for every weight of four bits, and against an encoder that shares nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeq.four_bits
from moeq import mxfp4
from moeq.quantize import LARGEST, amax, dequantize
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import four_bits
from tests.quantized import Quantized, quantized
from tests.test_quantize import FLOATS, weights

INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY

FOUR_BITS = pytest.mark.parametrize("scheme", four_bits.SCHEMES, ids=lambda scheme: scheme.value)


def good_weights(dims: tuple[int, ...] = (2, 3)) -> st.SearchStrategy[Tensor]:
    """Those that nobody refuses."""
    return weights(dims).map(lambda w: w.double().clamp(-LARGEST, LARGEST).to(w.dtype))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.view(torch.uint8)


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(bits(found.group), bits(expected.group))
    assert torch.equal(found.codes, expected.codes)


def acting(of: Quantized, columns: int) -> Tensor:
    """fp32 [..., N, K]."""
    grain = Granularity.CHANNEL
    return dequantize(of.codes, of.scale, grain, group_scale=of.group, columns=columns)


def by_group(weight: Tensor) -> Tensor:
    """fp64 [..., N, G, 32], filled up with zeros."""
    k = weight.shape[-1]
    return torch.nn.functional.pad(weight.double(), (0, -k % 32)).unflatten(-1, (-1, 32))


@FOUR_BITS
@settings(max_examples=60)
@given(weight=good_weights(dims=(2,)))
def test_the_bytes_are_those_of_numpy(scheme: OnlineQuantScheme, weight: Tensor) -> None:
    weight = weight[:40]
    found = quantized(weight, scheme)
    codes, groups, scale = four_bits.encode(weight.double().numpy(), scheme)
    np.testing.assert_array_equal(found.scale.numpy(), scale)
    np.testing.assert_array_equal(bits(found.group).numpy(), groups)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@FOUR_BITS
@settings(max_examples=25)
@given(seed=st.integers(0, 999), size=st.sampled_from([3, 8, 16, 100]))
def test_the_bytes_of_ties_are_those_of_numpy(
    scheme: OnlineQuantScheme, seed: int, size: int
) -> None:
    """Small integers: candidates as good as each other, weights between two codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-size, size + 1, (20, 70), generator=generator).float()
    found = quantized(weight, scheme)
    codes, groups, _ = four_bits.encode(weight.double().numpy(), scheme)
    np.testing.assert_array_equal(bits(found.group).numpy(), groups)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@FOUR_BITS
@settings(max_examples=30)
@given(weight=good_weights())
def test_zeros_stay_zeros(scheme: OnlineQuantScheme, weight: Tensor) -> None:
    weight[..., ::3] = 0
    back = acting(quantized(weight, scheme), weight.shape[-1])
    assert bool((back[..., ::3] == 0).all())


@FOUR_BITS
@pytest.mark.parametrize("k", [1, 15, 16, 31, 33, 40, 63, 65])
def test_what_fills_a_row_up_is_zero(scheme: OnlineQuantScheme, k: int) -> None:
    of = quantized(randn(7, k), scheme)
    assert of.group is not None
    assert of.codes.shape == (7, -(-k // 32) * 16)
    nibbles = torch.stack((of.codes & 15, of.codes >> 4), -1).flatten(-2)
    assert bool((nibbles[:, k:] == four_bits.ZERO[scheme]).all())
    decoded = moeq.four_bits.decode(of.codes, of.group)
    assert decoded.shape[-1] % 32 == 0
    assert bool((decoded[:, k:] == 0).all())
    # and a longer row of zeros is the same
    longer = torch.nn.functional.pad(randn(7, k), (0, -k % 32))
    assert_same(quantized(longer, scheme), of)


@FOUR_BITS
@pytest.mark.parametrize("chunk", [1, 100, 500, 1 << 30])
def test_the_bytes_do_not_depend_on_chunks(
    scheme: OnlineQuantScheme, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = randn(333, 150)
    expected = quantized(weight, scheme)
    monkeypatch.setattr(moeq.four_bits, "_CHUNK", {"cpu": chunk})
    assert_same(quantized(weight, scheme), expected)


@FOUR_BITS
def test_the_bytes_do_not_depend_on_order_strides_or_neighbours(scheme: OnlineQuantScheme) -> None:
    weight = randn(60, 96) * randn(60, 1).mul(4).exp()
    whole = quantized(weight, scheme)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = Quantized(*(t[order] for t in whole))  # type: ignore[index]
    assert_same(quantized(weight[order], scheme), moved)
    assert_same(quantized(weight.t().contiguous().t(), scheme), whole)
    assert_same(quantized(weight.repeat_interleave(2, 0)[::2], scheme), whole)
    # Groups change places within a row
    turned = weight.unflatten(-1, (3, 32)).flip(1).flatten(1)
    found = quantized(turned, scheme)
    assert torch.equal(bits(found.group), bits(whole.group).flip(1))
    assert torch.equal(found.codes, whole.codes.unflatten(-1, (3, 16)).flip(1).flatten(1))


@FOUR_BITS
def test_the_bytes_do_not_depend_on_the_dtype(scheme: OnlineQuantScheme) -> None:
    weight = randn(40, 100).bfloat16().clamp(-8, 8)
    weight[weight.abs() < 2.0**-6] = 0  # fp16 holds the others exactly
    expected = quantized(weight, scheme)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(weight.to(dtype).float(), weight.float())
        assert_same(quantized(weight.to(dtype), scheme), expected)


@FOUR_BITS
@settings(max_examples=25)
@given(k=st.integers(1, 200), cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_part_of_a_row_has_a_part_of_its_bytes(
    scheme: OnlineQuantScheme, k: int, cut: int, seed: int
) -> None:
    weight = randn(9, k, seed=seed)
    whole = quantized(weight, scheme)
    assert whole.group is not None
    maximum = amax(weight, Granularity.CHANNEL)
    at = min(cut, k // 32)
    for part, groups in (
        (weight[:, : at * 32], slice(at)),
        (weight[:, at * 32 :], slice(at, None)),
    ):
        found = quantized(part, scheme, maximum)
        expected = Quantized(
            whole.codes.unflatten(-1, (-1, 16))[:, groups].flatten(1),
            whole.scale,
            whole.group[:, groups],
        )
        assert_same(found, expected)


@FOUR_BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_and_subnormal_rows_stay_finite(scheme: OnlineQuantScheme, dtype: torch.dtype) -> None:
    for extreme in (min(torch.finfo(dtype).max, LARGEST), 2.0 ** FLOATS[dtype][0]):
        for other in (0.0, 1.0, -1.0):
            weight = torch.zeros(3, 70, dtype=dtype)
            weight[0, 3], weight[1, 69], weight[2] = extreme, -extreme, -extreme
            weight[0, 4] = weight[1, 64] = other * extreme
            of = quantized(weight, scheme)
            assert bool((of.scale >= 2.0**-126).all())
            assert bool(torch.isfinite(of.scale).all())
            back = acting(of, 70)
            assert bool(torch.isfinite(back).all())
            # Two numbers of 11 bits: a code off by half a step, and -8 where 7 is the last
            bound = max(0.2 * extreme, 2.0**-126 * 2.0**-7)
            assert bool(((back.double() - weight.double()).abs() <= bound).all())
            for activations in (torch.bfloat16, torch.float32):
                grain = Granularity.CHANNEL
                acts = dequantize(
                    *of[:2], grain, dtype=activations, group_scale=of.group, columns=70
                )
                assert bool(torch.isfinite(acts).all())


@FOUR_BITS
@settings(max_examples=30)
@given(weight=good_weights(dims=(2,)))
def test_scales_are_what_a_checkpoint_may_hold(scheme: OnlineQuantScheme, weight: Tensor) -> None:
    """Powers of two, and normal numbers whose product a bf16 is, and with codes an fp16, too."""
    of = quantized(weight, scheme)
    assert of.group is not None
    mantissa, _ = torch.frexp(of.scale)
    assert bool((mantissa == 0.5).all())
    assert moeq.four_bits.CODES[of.group.dtype].are_scales(of.group)
    magnitude = bits(of.group) & (0x7F if scheme is INT4 else 0xFF)
    most = 0x7F if scheme is INT4 else 0xFF
    assert bool(((magnitude >= four_bits.LEAST[scheme]) & (magnitude < most)).all())
    product = of.group.float() * of.scale[:, None]
    normal = product.abs() >= 2.0**-126
    assert torch.equal(product.bfloat16().float()[normal], product[normal])
    codes = torch.tensor(moeq.four_bits.CODES[of.group.dtype].VALUES)
    values = (codes * of.group.float()[..., None])[of.group.float().abs() >= 2.0**-20]
    for activations in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(activations).float(), values)


@FOUR_BITS
def test_decode_takes_any_number_of_dimensions(scheme: OnlineQuantScheme) -> None:
    weight = randn(2, 3, 5, 70)
    of = quantized(weight, scheme)
    assert of.group is not None
    found = moeq.four_bits.decode(of.codes, of.group)
    assert (found.shape, found.dtype) == ((2, 3, 5, 96), torch.float32)
    expected = four_bits.decode(scheme, of.codes.numpy(), bits(of.group).numpy())
    np.testing.assert_array_equal(found.double().numpy(), expected)


@FOUR_BITS
def test_the_bytes_do_not_depend_on_the_default_dtype(scheme: OnlineQuantScheme) -> None:
    weight = randn(40, 100)
    expected = quantized(weight, scheme)
    mxfp4._tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads
    try:
        assert_same(quantized(weight, scheme), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        mxfp4._tables.cache_clear()


@FOUR_BITS
def test_no_rows_and_no_columns(scheme: OnlineQuantScheme) -> None:
    for shape in ((0, 40), (5, 0), (2, 0, 40)):
        weight = torch.empty(shape)
        of = quantized(weight, scheme)
        assert acting(of, shape[-1]).shape == shape
