"""Weights to codes: the same bytes as `moeq.quantize`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeq import four_bits
from moeq.errors import NonFiniteError
from moeq.experts import scale_shape
from moeq.quantize import (
    WEIGHT_DTYPES,
    amax,
    check_finite,
    quantize,
    quantize_activations,
    scale_from_amax,
)
from moeq.schemes import Granularity, OnlineQuantScheme
from moeq.span import Span
from tests.four_bits import SCHEMES
from tests.kernels.triton.device import DEVICE, needs_gpu

# The interpreter warns of NaN that the kernels pass on
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

CODES = (torch.int8, torch.float8_e4m3fn)
EVERY_GRAIN = pytest.mark.parametrize("granularity", Granularity, ids=lambda g: g.name)
EVERY_CODE = pytest.mark.parametrize("dtype", CODES, ids=str)


def quantize_weight(weight: Tensor, granularity: Granularity, codes: Tensor, scale: Tensor) -> None:
    from moeq.kernels.triton.weights import quantize_weights

    quantize_weights([Span.of(weight)], codes, scale, [0], [0], granularity)


def check(weight: Tensor, granularity: Granularity, dtype: torch.dtype) -> None:
    scale = scale_from_amax(amax(weight, granularity), dtype)
    codes = quantize(weight, scale, dtype, granularity)
    found = torch.full_like(codes, 3).to(DEVICE)
    found_scale = torch.full_like(scale, -1.0).to(DEVICE)
    quantize_weight(weight.to(DEVICE), granularity, found, found_scale)
    assert torch.equal(found_scale.cpu(), scale)
    assert torch.equal(found.cpu().view(torch.int8), codes.view(torch.int8))


@EVERY_GRAIN
@EVERY_CODE
@pytest.mark.parametrize("source", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (3, 1100)])
def test_the_same_bytes(
    granularity: Granularity, dtype: torch.dtype, source: torch.dtype, shape: tuple[int, int]
) -> None:
    sizes = torch.logspace(-30 if source != torch.float16 else -7, 3, shape[0])
    weight = (torch.randn(shape) * sizes[:, None]).to(source)
    weight[-1] *= -0.0
    check(weight, granularity, dtype)


@EVERY_GRAIN
@EVERY_CODE
def test_ties_zeros_subnormals_and_extremes(granularity: Granularity, dtype: torch.dtype) -> None:
    halves = torch.arange(-127, 127.5, 0.5).repeat(4, 1)
    halves[:, -1] = 127.0
    rows = [halves[0], halves[1] * 2.0**-140, halves[2] * 2.0**120, halves[3] * 0]
    check(torch.stack(rows), granularity, dtype)


@EVERY_GRAIN
@EVERY_CODE
@pytest.mark.parametrize(("n", "k"), [(5, 33), (130, 144)])
def test_many_matrices_in_one_launch(
    granularity: Granularity, dtype: torch.dtype, n: int, k: int
) -> None:
    """Between matrices lie bytes that nobody may write; two of them share a scale per tensor."""
    from moeq.kernels.triton.weights import quantize_weights

    many = 4
    weights = torch.randn(many, n, k).bfloat16() * torch.logspace(-2, 1, many)[:, None, None]
    grid = scale_shape(granularity, (n, k))
    storage = torch.full((many + 1, n + 1, k), 3, dtype=torch.int8).to(DEVICE)
    scales = torch.full((many, *grid), -1.0).to(DEVICE)
    shared = granularity is Granularity.TENSOR
    own = [0 if shared and i == 1 else i for i in range(many)]
    # In no order: those that share a scale need not come one after the other
    order = [2, 0, 3, 1]
    quantize_weights(
        [Span.of(weights[i].to(DEVICE)) for i in order],
        storage.view(dtype),
        scales,
        [(n + 1) * k * i for i in order],
        [scales[0].numel() * own[i] for i in order],
        granularity,
    )
    for i in range(many):
        whole = amax(weights[i], granularity)
        if shared and i < 2:
            whole = torch.maximum(*(amax(weights[j], granularity) for j in (0, 1)))
        scale = scale_from_amax(whole, dtype)
        assert torch.equal(scales[own[i]].cpu(), scale)
        codes = quantize(weights[i], scale, dtype, granularity)
        assert torch.equal(storage[i, :n].cpu(), codes.view(torch.int8))
    assert bool((storage[:, n] == 3).all())
    assert bool((storage[many] == 3).all())


@EVERY_GRAIN
@pytest.mark.parametrize("k", [20_000, 16_385])
def test_rows_that_no_program_holds(granularity: Granularity, k: int) -> None:
    check(torch.randn(3, k).bfloat16(), granularity, torch.int8)


@EVERY_GRAIN
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale(granularity: Granularity, bad: float) -> None:
    weight = torch.randn(140, 140)
    weight[137, 3] = bad
    weight = weight.to(DEVICE)
    scale = torch.zeros(scale_shape(granularity, (140, 140)), device=DEVICE)
    quantize_weight(weight, granularity, weight.new_empty(140, 140, dtype=torch.int8), scale)
    with pytest.raises(NonFiniteError, match=r"\[137, 3\]"):
        check_finite(weight, scale, "w")


@pytest.mark.parametrize("granularity", Granularity, ids=lambda g: g.name)
def test_an_empty_matrix_has_scale_one(granularity: Granularity) -> None:
    scale = torch.zeros(scale_shape(granularity, (3, 0)), device=DEVICE)
    quantize_weight(
        torch.empty(3, 0, device=DEVICE),
        granularity,
        torch.empty(3, 0, dtype=torch.int8, device=DEVICE),
        scale,
    )
    assert bool((scale == 1).all())


FOUR_BITS = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)


def check_groups(scheme: OnlineQuantScheme, weight: Tensor, many: int = 1) -> None:
    """Of `many` matrices, one above the other, in one launch and in no order; between them lie
    bytes that nobody may write."""
    from moeq.kernels.triton.weights import quantize_weights

    n, k = len(weight) // many, weight.shape[1]
    scale = four_bits.row_scale(weight.abs().amax(1))
    codes = torch.empty(len(weight), four_bits.packed(k), dtype=torch.uint8)
    groups = torch.empty(len(weight), four_bits.groups(k), dtype=scheme.group_dtype)
    four_bits.quantize(weight, scale, codes, groups)
    found = torch.full((many, n + 1, codes.shape[1]), 3, dtype=torch.uint8, device=DEVICE)
    found_groups = torch.full((many, n + 1, groups.shape[1]), 3, dtype=torch.uint8, device=DEVICE)
    found_scale = torch.full((many, n), -1.0, device=DEVICE)
    order = list(range(many))[::-1]
    spans = [Span.of(part) for part in weight.to(DEVICE).view(many, n, k)]
    quantize_weights(
        [spans[i] for i in order],
        found,
        found_scale,
        [i * found[0].numel() for i in order],
        [i * n for i in order],
        Granularity.CHANNEL,
        found_groups.view(scheme.group_dtype),
        [i * found_groups[0].numel() for i in order],
    )
    assert torch.equal(found_scale.flatten().cpu(), scale)
    assert torch.equal(found_groups[:, :n].flatten(0, 1).cpu(), groups.view(torch.uint8))
    assert torch.equal(found[:, :n].flatten(0, 1).cpu(), codes)
    assert bool((found[:, n] == 3).all())
    assert bool((found_groups[:, n] == 3).all())


@FOUR_BITS
@pytest.mark.parametrize("source", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("many", "n", "k"), [(1, 1, 1), (3, 5, 33), (2, 66, 300), (1, 20, 768), (1, 3, 1104)]
)
def test_groups_the_same_bytes(
    scheme: OnlineQuantScheme, source: torch.dtype, many: int, n: int, k: int
) -> None:
    sizes = torch.logspace(-30 if source != torch.float16 else -7, 3, many * n)
    weight = (torch.randn(many * n, k) * sizes[:, None]).to(source)
    weight[-1] *= -0.0
    check_groups(scheme, weight, many)


@FOUR_BITS
@pytest.mark.parametrize("power", [0, 100, -120, -135])
def test_groups_of_all_sizes_in_a_row(scheme: OnlineQuantScheme, power: int) -> None:
    """Those far below the largest reach the smallest group scale; some are zero."""
    by_group = torch.exp2(torch.randint(-20, 3, (40, 20))).repeat_interleave(32, 1)
    weight = torch.randn(40, 640) * by_group
    weight[3] = 0.0
    weight[4, :32] = -0.0
    weight[5, 32:] = 0.0
    check_groups(scheme, weight * 2.0**power)
    check_groups(scheme, (weight * 2.0**power).bfloat16())


@FOUR_BITS
def test_groups_of_equals(scheme: OnlineQuantScheme) -> None:
    """Weights half way between two codes, and groups with both largest weight and its opposite."""
    check_groups(scheme, torch.randint(-20, 21, (64, 320)).float())
    check_groups(scheme, torch.randint(-16, 17, (64, 320)).bfloat16())


@FOUR_BITS
def test_groups_of_rows_that_no_program_holds(scheme: OnlineQuantScheme) -> None:
    check_groups(scheme, torch.randn(2, 20_000).bfloat16())


@FOUR_BITS
@pytest.mark.parametrize("k", [140, 1100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale_above_groups(
    scheme: OnlineQuantScheme, bad: float, k: int
) -> None:
    from moeq.kernels.triton.weights import quantize_weights

    weight = torch.randn(6, k)
    weight[4, 135] = bad
    weight = weight.to(DEVICE)
    scale = torch.zeros(6, device=DEVICE)
    codes = torch.empty(6, four_bits.packed(k), dtype=torch.uint8, device=DEVICE)
    groups = torch.empty(6, four_bits.groups(k), dtype=torch.uint8, device=DEVICE)
    operands = (codes, scale, [0], [0], Granularity.CHANNEL, groups.view(scheme.group_dtype), [0])
    quantize_weights([Span.of(weight)], *operands)
    with pytest.raises(NonFiniteError, match=r"\[4, 135\]"):
        check_finite(weight, scale, "w")


@pytest.mark.parametrize(
    "scheme",
    [scheme for scheme in OnlineQuantScheme if scheme.quantizes_activations],
    ids=lambda scheme: scheme.value,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 300), (1030, 130)])
def test_activations_the_same_bytes(
    scheme: OnlineQuantScheme, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from moeq.kernels.triton.layer import quantize_rows

    x = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(dtype)
    x[-1] = 0
    codes, scale = quantize_rows(x.to(DEVICE), scheme)
    expected, expected_scale = quantize_activations(x, scheme)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu().view(torch.int8), expected.view(torch.int8))


@needs_gpu
@EVERY_GRAIN
@EVERY_CODE
@pytest.mark.parametrize("shape", [(1536, 2048), (2048, 768), (512, 14336), (2880, 2880)])
def test_the_same_bytes_at_full_size(
    granularity: Granularity, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    check((torch.randn(shape) * 0.02).to(torch.bfloat16), granularity, dtype)


@needs_gpu
@FOUR_BITS
@pytest.mark.parametrize("shape", [(1536, 2048), (2048, 768), (512, 14336), (2880, 2880)])
def test_groups_the_same_bytes_at_full_size(
    scheme: OnlineQuantScheme, shape: tuple[int, int]
) -> None:
    check_groups(scheme, (torch.randn(shape) * 0.02).to(torch.bfloat16))
