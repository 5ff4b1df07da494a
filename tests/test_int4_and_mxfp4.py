"""What is int4's alone, or mxfp4's: how near codes are, and what comes through unchanged."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeq import mxfp4
from moeq.schemes import OnlineQuantScheme
from tests.four_bits import LEAST
from tests.quantized import quantized
from tests.test_four_bits import acting, bits, by_group, good_weights, randn

INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
MXFP4 = OnlineQuantScheme.MXFP4_WEIGHT_ONLY


@settings(max_examples=40)
@given(weight=good_weights())
def test_every_weight_gets_the_nearest_code_of_int4(weight: Tensor) -> None:
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
def test_no_group_of_int4_is_worse_than_one_that_is_merely_rounded(weight: Tensor) -> None:
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


def test_int4_is_better_than_rounding_on_real_rows() -> None:
    weight = randn(256, 1024)
    x = by_group(weight)
    ours = (by_group(acting(quantized(weight, INT4), 1024)) - x).square().mean()
    largest = signed_largest(x)
    for step, gain in ((-largest / 8, 0.99), (largest.abs() / 7, 0.88)):
        theirs = (rounded(x, step) - x).square().mean()
        assert ours < gain * theirs
    assert 0.082**2 < ours < 0.085**2


def test_an_int4_group_far_below_its_row() -> None:
    """Less than 2^-13 of the row's largest is no number of steps of the smallest group scale."""
    weight = torch.zeros(1, 96)
    weight[0, 0] = 1.0
    weight[0, 32:64] = 2.0**-20
    weight[0, 64:] = torch.linspace(-1, 1, 32) * 2.0**-12
    of = quantized(weight, INT4)
    assert bits(of.group).tolist()[0][1] & 0x7F == LEAST[INT4]
    back = acting(of, 96)
    least = 2.0**-6 * float(of.scale)
    assert bool((back[0, 32:64] == 0).all())
    assert bool(((back - weight).abs()[0, 64:] <= least * 1.2).all())


def e2m1(x: Tensor, power: Tensor) -> Tensor:
    """The nearest multiples of 2^power that codes have, in fp64."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    away = (x.abs()[..., None] / 2.0 ** power[..., None] - magnitudes).abs()
    return magnitudes[away.argmin(-1)] * 2.0**power * x.sign()


@settings(max_examples=40)
@given(weight=good_weights(dims=(2,)))
def test_no_group_of_mxfp4_is_worse_than_the_formats_own_or_the_next_scale(weight: Tensor) -> None:
    weight = weight[:50]
    of = quantized(weight, MXFP4)
    row = of.scale.double()[:, None, None]
    x = by_group(weight) / row
    ours = (by_group(acting(of, weight.shape[-1])) / row - x).square().sum(-1).sqrt()
    largest = x.abs().amax(-1, keepdim=True)
    unit = largest[..., 0] * 2.0**-11
    power = torch.floor(torch.log2(largest.clamp(min=2.0**-110))) - 2
    for up in (0, 1):
        theirs = (e2m1(x, power + up) - x).square().sum(-1).sqrt()
        assert bool((ours <= theirs + 2 * unit * 32**0.5 + 2.0**-149 / row[..., 0]).all())


@settings(max_examples=40)
@given(seed=st.integers(0, 999), low=st.integers(-60, 0), high=st.integers(0, 60))
def test_what_was_mxfp4_comes_through(seed: int, low: int, high: int) -> None:
    """Any codes under any scales: also groups whose codes are all small, and rows of all sizes."""
    rng = np.random.default_rng(seed)
    values = np.array(mxfp4.VALUES)[rng.integers(0, 16, (12, 5, 32))]
    values *= rng.integers(0, 2, (12, 5, 1)) | (
        np.abs(values) <= rng.integers(0, 5, (12, 5, 1)) / 2
    )
    powers = rng.integers(low, high + 1, (12, 5, 1))
    weight = torch.from_numpy(values * 2.0**powers).flatten(1).bfloat16()
    assert torch.equal(acting(quantized(weight, MXFP4), 160), weight.float())


def test_mxfp4_is_better_than_the_formats_own_scale() -> None:
    weight = randn(256, 1024)
    x = by_group(weight)
    ours = (by_group(acting(quantized(weight, MXFP4), 1024)) - x).square().mean()
    power = torch.floor(torch.log2(x.abs().amax(-1, keepdim=True))) - 2
    assert ours < 0.95 * (e2m1(x, power) - x).square().mean()
    assert 0.11**2 < ours < 0.113**2


def test_an_mxfp4_group_far_below_its_row() -> None:
    """What is below 2^-124 of its row's largest has no scale."""
    weight = torch.zeros(1, 96)
    weight[0, 0] = 2.0**40
    weight[0, 32] = 2.0**-83
    weight[0, 64] = 2.0**-86
    of = quantized(weight, MXFP4)
    assert bits(of.group).tolist()[0][2] == LEAST[MXFP4]
    back = acting(of, 96)
    assert torch.equal(back[0, :64], weight[0, :64])
    assert float(back[0, 64]) in (0.0, 2.0**-86)
