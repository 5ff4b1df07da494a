"""What holds for every weight of four bits, and against an encoder that shares nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeq.int4
from moeq.quantize import LARGEST, amax, dequantize
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import int4
from tests.quantized import Quantized, quantized
from tests.test_quantize import FLOATS, weights

INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY


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


@settings(max_examples=60)
@given(weight=good_weights(dims=(2,)))
def test_the_bytes_are_those_of_numpy(weight: Tensor) -> None:
    weight = weight[:40]
    found = quantized(weight, INT4)
    codes, groups, scale = int4.encode(weight.double().numpy())
    np.testing.assert_array_equal(found.scale.numpy(), scale)
    np.testing.assert_array_equal(bits(found.group).numpy(), groups)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), size=st.sampled_from([3, 8, 16, 100]))
def test_the_bytes_of_ties_are_those_of_numpy(seed: int, size: int) -> None:
    """Small integers: candidates as good as each other, weights between two codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-size, size + 1, (20, 70), generator=generator).float()
    found = quantized(weight, INT4)
    codes, groups, _ = int4.encode(weight.double().numpy())
    np.testing.assert_array_equal(bits(found.group).numpy(), groups)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@settings(max_examples=40)
@given(weight=good_weights())
def test_every_weight_gets_the_nearest_code(weight: Tensor) -> None:
    of = quantized(weight, INT4)
    assert of.group is not None
    step = (of.group.double() * of.scale.double()[..., None])[..., None]
    grouped = by_group(weight)
    back = by_group(acting(of, weight.shape[-1]))
    largest = grouped.abs().amax(-1, keepdim=True)
    # The weights are rounded to 11 bits of the largest first, or of the smallest group scale
    unit = torch.maximum(largest, of.scale.double()[..., None, None] * 2.0**-6) * 2.0**-11
    inside = (grouped / step).clamp(-8, 7) * step
    # A step of the row's scale below 2^-149 is none in fp32
    slack = step.abs() * (0.5 + 2**-20) + unit + 2.0**-149
    assert bool(((back - inside).abs() <= slack).all())
    # Clipped by little: the step is at least 0.79 (16/18 of 16/18) of the eighth of the largest
    tiny = largest < of.scale.double()[..., None, None] * 2.0**-3
    assert bool(((step.abs() >= 0.79 * largest / 8) | tiny).all())


@settings(max_examples=40)
@given(weight=good_weights(dims=(2,)))
def test_no_group_is_worse_than_one_that_is_merely_rounded(weight: Tensor) -> None:
    """To the nearest code under |largest| / 8, as e4m3 has it: the usual way."""
    weight = weight[:50]
    of = quantized(weight, INT4)
    row = of.scale.double()[:, None, None]
    x = by_group(weight) / row
    ours = (by_group(acting(of, weight.shape[-1])) / row - x).square().sum(-1).sqrt()
    largest = signed_largest(x)
    step = (-largest / 8).float().to(torch.float8_e4m3fn).double()
    step = torch.where(step.abs() < 2.0**-6, 2.0**-6, step)
    theirs = (rounded(x, step) - x).square().sum(-1).sqrt()
    # Judged by weights of 11 bits, which are off by half of one, on either side
    unit = largest.abs().clamp(min=2.0**-6)[..., 0] * 2.0**-11
    assert bool((ours <= theirs + 2 * unit * 32**0.5 + 2.0**-149 / row[..., 0]).all())


def signed_largest(x: Tensor) -> Tensor:
    """[..., 1] of groups [..., 32]; of two as large the positive one."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    return torch.where(high >= -low, high, low)


def rounded(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).round().clamp(-8, 7) * step


def test_better_than_rounding_on_real_rows() -> None:
    weight = randn(256, 1024)
    x = by_group(weight)
    ours = (by_group(acting(quantized(weight, INT4), 1024)) - x).square().mean()
    largest = signed_largest(x)
    for step, gain in ((-largest / 8, 0.99), (largest.abs() / 7, 0.88)):
        theirs = (rounded(x, step) - x).square().mean()
        assert ours < gain * theirs
    assert 0.082**2 < ours < 0.085**2


@settings(max_examples=30)
@given(weight=good_weights())
def test_zeros_stay_zeros(weight: Tensor) -> None:
    weight[..., ::3] = 0
    back = acting(quantized(weight, INT4), weight.shape[-1])
    assert bool((back[..., ::3] == 0).all())


@pytest.mark.parametrize("k", [1, 15, 16, 31, 33, 40, 63, 65])
def test_what_fills_a_row_up_is_zero(k: int) -> None:
    of = quantized(randn(7, k), INT4)
    assert of.group is not None
    assert of.codes.shape == (7, -(-k // 32) * 16)
    nibbles = torch.stack((of.codes & 15, of.codes >> 4), -1).flatten(-2)
    assert bool((nibbles[:, k:] == 8).all())
    decoded = moeq.int4.decode(of.codes, of.group)
    assert decoded.shape[-1] % 32 == 0
    assert bool((decoded[:, k:] == 0).all())
    # and a longer row of zeros is the same
    longer = torch.nn.functional.pad(randn(7, k), (0, -k % 32))
    assert_same(quantized(longer, INT4), of)


@pytest.mark.parametrize("chunk", [1, 100, 500, 1 << 30])
def test_the_bytes_do_not_depend_on_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(333, 150)
    expected = quantized(weight, INT4)
    monkeypatch.setattr(moeq.int4, "_CHUNK", {"cpu": chunk})
    assert_same(quantized(weight, INT4), expected)


def test_the_bytes_do_not_depend_on_order_strides_or_neighbours() -> None:
    weight = randn(60, 96) * randn(60, 1).mul(4).exp()
    whole = quantized(weight, INT4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = Quantized(*(t[order] for t in whole))  # type: ignore[index]
    assert_same(quantized(weight[order], INT4), moved)
    assert_same(quantized(weight.t().contiguous().t(), INT4), whole)
    assert_same(quantized(weight.repeat_interleave(2, 0)[::2], INT4), whole)
    # Groups change places within a row
    turned = weight.unflatten(-1, (3, 32)).flip(1).flatten(1)
    found = quantized(turned, INT4)
    assert torch.equal(bits(found.group), bits(whole.group).flip(1))
    assert torch.equal(found.codes, whole.codes.unflatten(-1, (3, 16)).flip(1).flatten(1))


def test_the_bytes_do_not_depend_on_the_dtype() -> None:
    weight = randn(40, 100).bfloat16().clamp(-8, 8)
    weight[weight.abs() < 2.0**-6] = 0  # fp16 holds the others exactly
    expected = quantized(weight, INT4)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(weight.to(dtype).float(), weight.float())
        assert_same(quantized(weight.to(dtype), INT4), expected)


@settings(max_examples=25)
@given(k=st.integers(1, 200), cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_part_of_a_row_has_a_part_of_its_bytes(k: int, cut: int, seed: int) -> None:
    weight = randn(9, k, seed=seed)
    whole = quantized(weight, INT4)
    assert whole.group is not None
    maximum = amax(weight, Granularity.CHANNEL)
    at = min(cut, k // 32)
    for part, groups in (
        (weight[:, : at * 32], slice(at)),
        (weight[:, at * 32 :], slice(at, None)),
    ):
        found = quantized(part, INT4, maximum)
        expected = Quantized(
            whole.codes.unflatten(-1, (-1, 16))[:, groups].flatten(1),
            whole.scale,
            whole.group[:, groups],
        )
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_and_subnormal_rows_stay_finite(dtype: torch.dtype) -> None:
    for extreme in (min(torch.finfo(dtype).max, LARGEST), 2.0 ** FLOATS[dtype][0]):
        for other in (0.0, 1.0, -1.0):
            weight = torch.zeros(3, 70, dtype=dtype)
            weight[0, 3], weight[1, 69], weight[2] = extreme, -extreme, -extreme
            weight[0, 4] = weight[1, 64] = other * extreme
            of = quantized(weight, INT4)
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


@settings(max_examples=30)
@given(weight=good_weights(dims=(2,)))
def test_scales_are_what_a_checkpoint_may_hold(weight: Tensor) -> None:
    """Powers of two, and normal numbers of e4m3 whose product a bf16 is."""
    of = quantized(weight, INT4)
    assert of.group is not None
    mantissa, _ = torch.frexp(of.scale)
    assert bool((mantissa == 0.5).all())
    magnitude = bits(of.group) & 0x7F
    assert bool(((magnitude >= 8) & (magnitude < 0x7F)).all())
    product = of.group.float() * of.scale[:, None]
    normal = product.abs() >= 2.0**-126
    assert torch.equal(product.bfloat16().float()[normal], product[normal])
    codes = torch.arange(-8.0, 8)
    values = codes * of.group.float()[..., None]
    for activations in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(activations).float(), values)


def test_a_group_far_below_its_row() -> None:
    """Less than 2^-13 of the row's largest is no number of steps of the smallest group scale."""
    weight = torch.zeros(1, 96)
    weight[0, 0] = 1.0
    weight[0, 32:64] = 2.0**-20
    weight[0, 64:] = torch.linspace(-1, 1, 32) * 2.0**-12
    of = quantized(weight, INT4)
    assert bits(of.group).tolist()[0][1] & 0x7F == moeq.int4.E4M3_LEAST
    back = acting(of, 96)
    least = 2.0**-6 * float(of.scale)
    assert bool((back[0, 32:64] == 0).all())
    assert bool(((back - weight).abs()[0, 64:] <= least * 1.2).all())


def test_decode_takes_any_number_of_dimensions() -> None:
    weight = randn(2, 3, 5, 70)
    of = quantized(weight, INT4)
    assert of.group is not None
    found = moeq.int4.decode(of.codes, of.group)
    assert (found.shape, found.dtype) == ((2, 3, 5, 96), torch.float32)
    expected = int4.decode(of.codes.numpy(), bits(of.group).numpy())
    np.testing.assert_array_equal(found.double().numpy(), expected)


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 40), (5, 0), (2, 0, 40)):
        weight = torch.empty(shape)
        of = quantized(weight, INT4)
        assert acting(of, shape[-1]).shape == shape
