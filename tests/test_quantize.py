"""What holds for every weight: how large the error can be, and what the bytes cannot depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moeq.quantize
from moeq.errors import NonFiniteError
from moeq.experts import scale_shape
from moeq.quantize import LARGEST, QMAX, amax, check_finite, dequantize, quantize, scale_from_amax
from moeq.schemes import Granularity
from tests import e4m3

INT8, FP8 = torch.int8, torch.float8_e4m3fn

EVERY_CODE = pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", Granularity, ids=lambda g: g.name)

FLOATS = {torch.float16: (-24, 15), torch.bfloat16: (-133, 127), torch.float32: (-149, 127)}
"""Exponents of the least subnormal and of the largest power of two."""


@st.composite
def weights(draw: st.DrawFn, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    """[N, K] or [E, N, K] of any float dtype: rows of wildly different sizes, some of them zero."""
    dtype = draw(st.sampled_from(list(FLOATS)))
    shape = (draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    if draw(st.sampled_from(dims)) == 3:
        shape = (draw(st.integers(1, 3)), *shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = FLOATS[dtype]
    fraction = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    exponent = torch.randint(low, high + 1, (*shape[:-1], 1), generator=generator)
    if draw(st.booleans()):  # all rows of about the same size, as real ones are
        exponent = exponent.flatten()[0] + torch.zeros_like(exponent)
    weight = (fraction * torch.pow(2.0, exponent.double())).to(dtype)
    keep = torch.rand((*shape[:-1], 1), generator=generator) > draw(st.sampled_from([0.0, 0.3]))
    return weight * keep


def quantized(
    weight: Tensor, dtype: torch.dtype, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    scale = scale_from_amax(amax(weight, granularity), dtype)
    return quantize(weight, scale, dtype, granularity), scale


def per_element(scale: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """The scale of every weight, fp64, in the dullest way."""
    *_, n, k = shape
    match granularity:
        case Granularity.TENSOR:
            return scale.double()[..., None, None].expand(shape)
        case Granularity.CHANNEL:
            return scale.double()[..., None].expand(shape)
        case Granularity.BLOCK:
            row, column = torch.arange(n) // 128, torch.arange(k) // 128
            return scale.double()[..., row, :][..., column]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@EVERY_GRANULARITY
@settings(max_examples=25)
@given(weight=weights())
def test_int8_is_off_by_at_most_half_a_step(granularity: Granularity, weight: Tensor) -> None:
    codes, scale = quantized(weight, INT8, granularity)
    assert codes.shape == weight.shape
    assert scale.shape == scale_shape(granularity, tuple(weight.shape))
    assert scale.dtype == torch.float32
    assert int(codes.min()) >= -127
    step = per_element(scale, granularity, weight.shape)
    error = (codes.double() * step - weight.double()).abs()
    # Beyond the half, the quotient (<= 127) is rounded once, to 2^-24 of itself; so is the scale.
    assert bool((error <= step * (0.5 + 127 * 2**-23)).all())


@EVERY_GRANULARITY
@settings(max_examples=25)
@given(weight=weights())
def test_fp8_is_off_by_at_most_half_the_spacing_of_its_codes(
    granularity: Granularity, weight: Tensor
) -> None:
    codes, scale = quantized(weight, FP8, granularity)
    assert codes.shape == weight.shape
    step = per_element(scale, granularity, weight.shape)
    quotient = (weight.double() / step).clamp(-448, 448)
    spacing = torch.from_numpy(e4m3.spacing(quotient.numpy()))
    error = (codes.double() * step - weight.double()).abs()
    # Beyond the half spacing (2^-10 among subnormals), scale and quotient are rounded to 2^-24.
    assert bool((error <= step * (0.5 * spacing + quotient.abs() * 2**-23)).all())


@EVERY_GRANULARITY
@EVERY_CODE
@settings(max_examples=10)
@given(weight=weights())
def test_the_largest_of_a_group_gets_the_largest_code(
    granularity: Granularity, dtype: torch.dtype, weight: Tensor
) -> None:
    codes, scale = quantized(weight, dtype, granularity)
    largest = amax(codes.float(), granularity)
    group = amax(weight, granularity)
    normal = group >= QMAX[dtype] * 2.0**-126  # below that the floor of the scale takes over
    assert bool((largest[normal] == QMAX[dtype]).all())
    assert bool((scale >= 2.0**-126).all())
    assert bool((scale[group == 0] == 1).all())


@EVERY_GRANULARITY
@settings(max_examples=15)
@given(weight=weights())
def test_amax_is_exact(granularity: Granularity, weight: Tensor) -> None:
    found = amax(weight, granularity)
    assert found.dtype == torch.float32
    at = per_element(found, granularity, weight.shape)
    assert bool((weight.double().abs() <= at).all())
    # and reached: a group whose elements are all smaller would dequantize its own amax to less
    reached = amax(torch.where(weight.double().abs() == at, weight, 0), granularity)
    assert torch.equal(reached, found)


@EVERY_GRANULARITY
@EVERY_CODE
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_get_scale_one_and_codes_of_zero(
    granularity: Granularity, dtype: torch.dtype, zero: float
) -> None:
    weight = torch.full((2, 130, 140), zero, dtype=torch.bfloat16)
    codes, scale = quantized(weight, dtype, granularity)
    assert torch.equal(scale, torch.ones(scale_shape(granularity, (2, 130, 140))))
    assert bool((codes.float() == 0).all())


@EVERY_CODE
def test_a_zero_row_or_block_or_expert_stays_zero_beside_others(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 140, 150, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1, 5] = 0
    weight[2, :128, 128:] = 0
    for granularity, zero_scale in (
        (Granularity.TENSOR, (0,)),
        (Granularity.CHANNEL, (1, 5)),
        (Granularity.BLOCK, (2, 0, 1)),
    ):
        codes, scale = quantized(weight, dtype, granularity)
        assert scale[zero_scale] == 1
        assert bool((codes.float()[weight == 0] == 0).all())


@EVERY_GRANULARITY
@EVERY_CODE
def test_the_bytes_do_not_depend_on_chunks(
    granularity: Granularity, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(333, 150, generator=torch.Generator().manual_seed(1))
    encoded: list[int] = []

    def counting(quotient: Tensor, dtype: torch.dtype) -> Tensor:
        encoded.append(quotient.shape[0])
        return encode(quotient, dtype)

    encode = moeq.quantize._within_range
    monkeypatch.setattr(moeq.quantize, "_within_range", counting)
    monkeypatch.setattr(moeq.quantize, "_CHUNK", {"cpu": weight.numel()})
    whole, whole_scale = quantized(weight, dtype, granularity)
    monkeypatch.setattr(moeq.quantize, "_CHUNK", {"cpu": 1})
    codes, scale = quantized(weight, dtype, granularity)
    assert same_bytes(codes, whole)
    assert torch.equal(scale, whole_scale)
    least = [128, 128, 77] if granularity is Granularity.BLOCK else [1] * 333
    # One chunk, rounded down to whole blocks; then as many as there can be.
    assert encoded == ([256, 77] if granularity is Granularity.BLOCK else [333]) + least


@EVERY_CODE
@settings(max_examples=10)
@given(weight=weights(dims=(3,)), seed=st.integers(0, 99))
def test_the_bytes_do_not_depend_on_the_order_of_experts_or_rows(
    dtype: torch.dtype, weight: Tensor, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for granularity, dim in (
        (Granularity.TENSOR, 0),
        (Granularity.BLOCK, 0),
        (Granularity.CHANNEL, 0),
        (Granularity.CHANNEL, 1),
    ):
        codes, scale = quantized(weight, dtype, granularity)
        order = torch.randperm(weight.shape[dim], generator=generator)
        moved, moved_scale = quantized(weight.index_select(dim, order), dtype, granularity)
        assert torch.equal(moved_scale, scale.index_select(dim, order))
        assert torch.equal(moved.float(), codes.float().index_select(dim, order))


@EVERY_CODE
@settings(max_examples=10)
@given(weight=weights(), ranks=st.integers(2, 4))
def test_ranks_that_reduce_their_amax_get_the_bytes_of_the_whole(
    dtype: torch.dtype, weight: Tensor, ranks: int
) -> None:
    for granularity in (Granularity.CHANNEL, Granularity.TENSOR):
        codes, _ = quantized(weight, dtype, granularity)
        parts = weight.tensor_split(min(ranks, weight.shape[-1]), dim=-1)
        shared = torch.stack([amax(part, granularity) for part in parts]).amax(0)
        scale = scale_from_amax(shared, dtype)
        pieces = [quantize(part, scale, dtype, granularity) for part in parts]
        together = torch.cat([piece.view(torch.uint8) for piece in pieces], dim=-1)
        assert torch.equal(together, codes.view(torch.uint8))


@EVERY_GRANULARITY
@EVERY_CODE
@pytest.mark.parametrize("dtype_in", FLOATS, ids=str)
def test_huge_and_subnormal_weights_survive(
    granularity: Granularity, dtype: torch.dtype, dtype_in: torch.dtype
) -> None:
    # In fp32, qmax * scale can round to 2^-24 above amax: only below that of its largest is it
    # sure to be finite.
    largest = min(torch.finfo(dtype_in).max, 3.4e38)
    for extreme in (largest, 2.0 ** FLOATS[dtype_in][0]):
        weight = torch.zeros(2, 200, dtype=dtype_in)
        weight[0, 3], weight[1, 150] = extreme, -extreme
        codes, scale = quantized(weight, dtype, granularity)
        back = dequantize(codes, scale, granularity)
        assert bool(torch.isfinite(back).all())
        # qmax * (amax / qmax) can round to 2^-24 off; below the floor, half the least step
        half = torch.tensor(extreme).mul(2**-23).clamp(min=2.0**-127)
        assert bool(((back.double() - weight.double()).abs() <= half).all())


def test_scales_computed_in_bf16_would_be_worse() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(256, 1024, generator=generator).bfloat16()
    codes, scale = quantized(weight, INT8, Granularity.CHANNEL)
    bf16_scale = weight.abs().amax(-1, keepdim=True) / 127
    bf16_codes = (weight / bf16_scale).round().clamp(-127, 127)
    assert bf16_scale.dtype == bf16_codes.dtype == torch.bfloat16

    def squared(back: Tensor) -> float:
        return float((back.double() - weight.double()).square().sum())

    ours = squared(dequantize(codes, scale, Granularity.CHANNEL))
    theirs = squared(bf16_codes.double() * bf16_scale.double())
    # Measured 1.12 on Gaussian rows, for any seed; the module's docstring says 11 %.
    assert 1.08 < theirs / ours < 1.16


@EVERY_GRANULARITY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_are_refused_with_name_index_and_count(
    granularity: Granularity, value: float, dtype: torch.dtype
) -> None:
    weight = torch.ones(2, 140, 150, dtype=dtype)
    check_finite(weight, amax(weight, granularity), "fine")
    weight[1, 2, 3] = weight[1, 139, 149] = value
    with pytest.raises(NonFiniteError) as caught:
        check_finite(weight, amax(weight, granularity), "layers.0.up_proj.weight")
    assert caught.value.message == (
        f"layers.0.up_proj.weight: {value} at [1, 2, 3],"
        " 2 of 42000 values are NaN, Inf or above 1.69e+38"
    )
    assert "damaged" in caught.value.hint


@EVERY_GRANULARITY
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_what_could_be_inf_is_refused_and_all_else_stays_finite(
    granularity: Granularity, dtype: torch.dtype
) -> None:
    weight = torch.full((3, 5), -LARGEST)
    check_finite(weight, amax(weight, granularity), "fine")
    scale = scale_from_amax(amax(weight, granularity), dtype)
    codes = quantize(weight, scale, dtype, granularity)
    for activations in (torch.float32, torch.bfloat16):
        assert dequantize(codes, scale, granularity, dtype=activations).isfinite().all()
    for above in (torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max, 2.0**127):
        weight[1, 2] = above
        with pytest.raises(NonFiniteError, match=r"w: \d\S* at \[1, 2\], 1 of 15 values"):
            check_finite(weight, amax(weight, granularity), "w")


@EVERY_GRANULARITY
@EVERY_CODE
def test_quantize_writes_into_out(granularity: Granularity, dtype: torch.dtype) -> None:
    weight = torch.randn(2, 130, 70, generator=torch.Generator().manual_seed(3))
    codes, scale = quantized(weight, dtype, granularity)
    storage = torch.full((2, 300, 70), 55, dtype=torch.uint8).view(dtype)
    out = storage[:, 100:230]  # a part of something larger, as gate and up are of w13
    assert quantize(weight, scale, dtype, granularity, out=out) is out
    assert same_bytes(out, codes)
    around = torch.cat([storage[:, :100], storage[:, 230:]], dim=1)
    assert bool((around.view(torch.uint8) == 55).all())


@EVERY_GRANULARITY
@EVERY_CODE
def test_weights_of_any_strides_have_the_same_bytes(
    granularity: Granularity, dtype: torch.dtype
) -> None:
    weight = torch.randn(140, 150, generator=torch.Generator().manual_seed(4))
    codes, scale = quantized(weight, dtype, granularity)
    stored_transposed, every_second = weight.t().contiguous().t(), weight.repeat_interleave(2, 0)
    for view in (stored_transposed, every_second[::2]):
        assert not view.is_contiguous()
        view_codes, view_scale = quantized(view, dtype, granularity)
        assert same_bytes(view_codes, codes)
        assert torch.equal(view_scale, scale)


@EVERY_CODE
def test_weights_above_the_amax_that_was_agreed_on_saturate(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1e4, -1e4, 500.0, -500.0, 1.0]])
    codes = quantize(weight, torch.ones(1), dtype, Granularity.CHANNEL)
    top = QMAX[dtype]
    assert codes.float().tolist() == [[top, -top, top, -top, 1]]


def test_quantize_refuses_scales_of_another_granularity() -> None:
    with pytest.raises(AssertionError, match=r"\(4,\), \(1, 1\)"):
        quantize(torch.ones(4, 4), torch.ones(4), INT8, Granularity.BLOCK)
