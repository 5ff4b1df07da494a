"""Whole layers against `reference`: every path, every shipped tiling, every kind of layer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.four_bits import decode
from moeq.kernels import reference
from moeq.kernels.activations import ACTIVATIONS
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import four_bits
from tests.kernels.layers import random_weights, route, truth
from tests.kernels.triton.device import DEVICE, needs_gpu, to_device

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
    # Rows of other ranks' pairs hold what memory held, and the interpreter computes with it
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""|error| / |truth| in the 2-norm. h, the outputs of experts and their sum are rounded, 2^-9 at
most each in bf16 and 2^-12 in fp16; fp8 products add about 2^-9 inside the tensor cores."""

REQUANTIZED = 2.0**-5
"""The same where h is quantized to fp8 between the products: an h that differs in its last bit may
round to the neighbouring code, which is 2^-4 away."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def tilings() -> list[tuple[str, dict[str, Any]]]:
    table = json.loads(resources.files("moeq.kernels.triton").joinpath("tilings.json").read_text())
    return [
        (name, row) for name, family in table.items() if name != "about" for row in family["gemm"]
    ]


SCHEMES = {
    "decode": OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY,
    "decode_block": OnlineQuantScheme.FP8_PER_BLOCK,
    "decode_groups": OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY,
    "mxfp4": OnlineQuantScheme.MXFP4_WEIGHT_ONLY,
    "fp8": OnlineQuantScheme.FP8_PER_CHANNEL,
    "int8": OnlineQuantScheme.INT8_PER_CHANNEL,
    "fp8_block": OnlineQuantScheme.FP8_PER_BLOCK,
}


def run(
    x: Tensor, ids: Tensor, factors: Tensor, weights: ExpertWeights, activation: str, path: Any
) -> Tensor:
    from moeq.kernels.triton import layer, plans

    arithmetic = plans.arithmetic(DEVICE, weights.scheme)
    moved = [t.to(DEVICE) for t in (x, ids, factors)]
    if path is not None:  # below the entry that sees to it
        moved = [t.contiguous() for t in moved]
    args = (*moved, to_device(weights), activation)
    if path is None:
        from moeq.kernels import triton

        return triton.fused_experts(*args).cpu()
    return layer.fused_experts(*args, path, arithmetic).cpu()


def assert_close(
    actual: Tensor, expected: Tensor, scheme: OnlineQuantScheme, *, factor: float = 1
) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    is_fp8 = scheme.weight_dtype == torch.float8_e4m3fn and scheme.quantizes_activations
    tolerance = REQUANTIZED if is_fp8 else TOLERANCE[actual.dtype] * factor
    assert error < tolerance, f"{error:.2e}"


@EVERY_SCHEME
@FLOATS
@pytest.mark.parametrize(
    ("t", "k", "e", "h", "i", "gated", "bias"),
    [
        (1, 2, 8, 96, 200, True, False),
        (1, 3, 5, 160, 72, False, True),
        (2, 1, 3, 130, 140, True, True),
        (9, 2, 6, 192, 144, True, True),
        (20, 3, 4, 64, 272, False, False),
        (150, 2, 3, 136, 80, True, False),
    ],
)
def test_as_the_oracle_would_run_it(
    scheme: OnlineQuantScheme,
    dtype: torch.dtype,
    t: int,
    k: int,
    e: int,
    h: int,
    i: int,
    gated: bool,
    bias: bool,
) -> None:
    weights = random_weights(scheme, e, h, i, gated=gated, bias=dtype if bias else None)
    ids, factors = route(t, k, e)
    x = torch.randn(t, h).to(dtype)
    actual = run(x, ids, factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@pytest.mark.parametrize(
    ("family", "row"), tilings(), ids=[f"{name}-{row['rows']}" for name, row in tilings()]
)
def test_every_shipped_tiling(family: str, row: dict[str, Any]) -> None:
    from moeq.kernels.triton import layer, plans
    from moeq.kernels.triton.layer import Gemm, GemmPath

    scheme = SCHEMES[family]
    codes = not family.startswith("decode")
    path = GemmPath(row["block_m"], Gemm(**row["up"]), Gemm(**row["down"]))
    full = DEVICE.type == "cuda"
    e, h, i = (16, 768, 640) if full else (3, 256, 160)
    weights = random_weights(scheme, e, h, i, bias=torch.bfloat16)
    t = 700 if full else row["block_m"] + 40  # some tiles are full, some have a row or two
    ids, factors = route(t, 2, e)
    x = torch.randn(t, h).bfloat16()
    arithmetic = replace(plans.arithmetic(DEVICE, scheme), codes=codes)
    moved = [v.to(DEVICE).contiguous() for v in (x, ids, factors)]
    args = (*moved, to_device(weights), "silu")
    actual = layer.fused_experts(*args, path, arithmetic).cpu()
    if codes or not scheme.quantizes_activations:
        expected = reference.fused_experts(x, ids, factors, weights, "silu")
        assert_close(actual, expected, scheme)
    else:
        expected = truth(x, ids, factors, weights, "silu").to(x.dtype)
        assert_close(actual, expected, SCHEMES["decode"])
    assert torch.equal(actual, layer.fused_experts(*args, path, arithmetic).cpu())


@pytest.mark.parametrize(("n", "k"), [(264, 128), (256, 136), (264, 136)])
@pytest.mark.parametrize("misaligned", [False, True])
def test_many_rows_of_blocks_that_no_descriptor_describes(n: int, k: int, misaligned: bool) -> None:
    """Rows, or a first byte, that are no multiple of 16 bytes; and columns that are not."""
    from moeq.kernels import triton

    scheme = OnlineQuantScheme.FP8_PER_BLOCK
    w = to_device(random_weights(scheme, 1, n, k, gated=False))
    codes = w.w2
    if misaligned:
        room = torch.empty(codes.numel() + 1, dtype=codes.dtype, device=DEVICE)
        codes = room[1:].view(codes.shape).copy_(codes)
        assert codes.data_ptr() % 16
    x = torch.randn(257, k).bfloat16()
    expected = reference.linear(x, w.w2[0].cpu(), w.w2_scale[0].cpu(), None, None, scheme)
    actual = triton.linear(x.to(DEVICE), codes[0], w.w2_scale[0], None, None, scheme)
    assert_close(actual.cpu(), expected, scheme)
    ids = torch.zeros(257, 1, dtype=torch.long, device=DEVICE)
    actual = triton.expert_linear(
        x[:, None].to(DEVICE), ids, codes, w.w2_scale, None, None, scheme, 1
    )
    assert_close(actual[:, 0].cpu(), expected, scheme)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("h", "i"), [(256, 136), (136, 256)])
def test_many_rows_of_blocks_of_odd_widths(h: int, i: int, gated: bool) -> None:
    from moeq.kernels import triton

    scheme = OnlineQuantScheme.FP8_PER_BLOCK
    weights = random_weights(scheme, 1, h, i, gated=gated)
    x, ids, factors = torch.randn(257, h).bfloat16(), torch.zeros(257, 1).long(), torch.ones(257, 1)
    expected = reference.fused_experts(x, ids, factors, weights, "silu")
    moved = [v.to(DEVICE) for v in (x, ids, factors)]
    actual = triton.fused_experts(*moved, to_device(weights), "silu")
    assert_close(actual.cpu(), expected, scheme)


def test_fp16_has_room_for_outputs_of_experts_before_their_weights() -> None:
    from moeq.kernels import triton

    weights = random_weights(SCHEMES["decode"], 2, 16, 16, gated=False)
    weights = replace(weights, w2_scale=torch.full_like(weights.w2_scale, 60.0))
    for t in (512, 513):
        x, factors = torch.randn(t, 16).half(), torch.full((t, 2), 0.05)
        ids = torch.tensor([[0, 1]]).repeat(t, 1)
        expected = reference.fused_experts(x, ids, factors, weights, "relu")
        assert bool(torch.isfinite(expected).all())
        moved = [v.to(DEVICE) for v in (x, ids, factors)]
        actual = triton.fused_experts(*moved, to_device(weights), "relu")
        assert_close(actual.cpu(), expected, SCHEMES["decode"])


@pytest.mark.parametrize("block_n", [128, 256])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("h", "i"), [(272, 144), (80, 400)])
def test_halves_of_tiles_that_end_inside_a_block(h: int, i: int, gated: bool, block_n: int) -> None:
    """Past the last block there is no scale, and the next row is of another projection."""
    from moeq.kernels.triton import layer, plans
    from moeq.kernels.triton.layer import Gemm, GemmPath

    scheme = OnlineQuantScheme.FP8_PER_BLOCK
    weights = random_weights(scheme, 3, h, i, gated=gated, bias=torch.bfloat16)
    ids, factors = route(90, 2, 3)
    x = torch.randn(90, h).bfloat16()
    config = Gemm(block_n, 128, 4, 2, tail_m=32, halves=True)
    arithmetic = plans.arithmetic(DEVICE, scheme)
    moved = [v.to(DEVICE).contiguous() for v in (x, ids, factors)]
    path = GemmPath(64, config, config)
    args = (*moved, to_device(weights), "silu", path, arithmetic)
    actual = layer.fused_experts(*args).cpu()
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [1, 5, 60])
@pytest.mark.parametrize(
    "scheme",
    [s for s in OnlineQuantScheme if s.weight_dtype == torch.float8_e4m3fn],
    ids=lambda scheme: scheme.value,
)
def test_fp8_without_fp8_units_is_weight_only_and_exact(
    scheme: OnlineQuantScheme, t: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeq.kernels.triton import plans

    monkeypatch.setattr(plans, "gpu", lambda device: plans.Gpu((8, 0), 163 << 10))
    for cache in (plans.arithmetic, plans.choose):
        cache.cache_clear()
    try:
        weights = random_weights(scheme, 4, 140, 136, bias=dtype)
        ids, factors = route(t, 2, 4)
        x = torch.randn(t, 140).to(dtype)
        actual = run(x, ids, factors, weights, "silu", None)
        expected = truth(x, ids, factors, weights, "silu").to(x.dtype)
        # The scale of a block multiplies after rounding to the rows' dtype in neither
        assert_close(actual, expected, SCHEMES["decode"])
    finally:
        for cache in (plans.arithmetic, plans.choose):
            cache.cache_clear()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("t", [1, 40])
def test_every_activation(activation: str, t: int) -> None:
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
    weights = random_weights(scheme, 3, 64, 96)
    ids, factors = route(t, 2, 3)
    x = torch.randn(t, 64).bfloat16()
    actual = run(x, ids, factors, weights, activation, None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, activation), scheme)


@EVERY_SCHEME
@pytest.mark.parametrize("t", [1, 40])
def test_ids_of_other_ranks_add_nothing(scheme: OnlineQuantScheme, t: int) -> None:
    weights = random_weights(scheme, 3, 64, 96, bias=torch.bfloat16)
    ids, factors = route(t, 3, 3)
    ids[0] = torch.tensor([-1, 2, 3])
    ids[-1, 2] = 1 << 20
    x = torch.randn(t, 64).bfloat16()
    actual = run(x, ids, factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)
    nowhere = run(x, torch.full_like(ids, -1), factors, weights, "silu", None)
    assert bool((nowhere == 0).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("t", [1, 33])
def test_ids_of_any_integer_type(dtype: torch.dtype, t: int) -> None:
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
    weights = random_weights(scheme, 256, 32, 16)
    ids, factors = route(t, 3, 256)
    x = torch.randn(t, 32).bfloat16()
    actual = run(x, ids.to(dtype), factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@pytest.mark.parametrize("t", [1, 5])
def test_an_id_past_32_bits_is_of_another_rank(t: int) -> None:
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
    weights = random_weights(scheme, 4, 32, 16)
    ids, factors = route(t, 3, 4)
    ids[0, 1] = 1 << 32
    x = torch.randn(t, 32).bfloat16()
    actual = run(x, ids, factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@EVERY_SCHEME
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("t", [1, 40])
def test_what_is_not_finite_stays_so(scheme: OnlineQuantScheme, bad: float, t: int) -> None:
    weights = random_weights(scheme, 3, 64, 96)
    ids, factors = route(t, 2, 3)
    x = torch.randn(t, 64).bfloat16()
    x[0, 7] = bad
    actual = run(x, ids, factors, weights, "relu", None)
    assert not bool(torch.isfinite(actual[0]).any())
    assert bool(torch.isfinite(actual[1:]).all())


def test_more_slots_than_a_program_reads_at_once() -> None:
    scheme = OnlineQuantScheme.FP8_PER_CHANNEL
    weights = random_weights(scheme, 90, 32, 16)
    ids, factors = route(1, 70, 90)
    x = torch.randn(1, 32).bfloat16()
    actual = run(x, ids, factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@EVERY_SCHEME
@pytest.mark.parametrize("t", [1, 70])
def test_all_tokens_to_one_expert(scheme: OnlineQuantScheme, t: int) -> None:
    weights = random_weights(scheme, 6, 64, 96)
    ids, factors = torch.full((t, 1), 4), torch.ones(t, 1)
    x = torch.randn(t, 64).bfloat16()
    actual = run(x, ids, factors, weights, "silu", None)
    assert_close(actual, reference.fused_experts(x, ids, factors, weights, "silu"), scheme)


@EVERY_SCHEME
def test_nothing_to_do(scheme: OnlineQuantScheme) -> None:
    weights = random_weights(scheme, 3, 64, 96)
    ids, factors = route(0, 2, 3)
    assert run(torch.randn(0, 64).bfloat16(), ids, factors, weights, "silu", None).shape == (0, 64)
    none = torch.empty(4, 0)
    x = torch.randn(4, 64).bfloat16()
    assert bool((run(x, none.long(), none, weights, "silu", None) == 0).all())


@EVERY_SCHEME
@pytest.mark.parametrize("t", [1, 3, 40])
def test_integers_come_out_bit_for_bit(scheme: OnlineQuantScheme, t: int) -> None:
    """Values whose sums are exact in every order, so that a single wrong element shows."""
    e, h, i = 4, 144, 136
    random = random_weights(scheme, e, h, i)

    def small(codes: Tensor) -> Tensor:
        if scheme.group is not None:
            ones = (
                [7, 8, 9] if scheme is OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY else [2, 0, 10]
            )
            low, high = torch.tensor(ones, dtype=torch.uint8)[torch.randint(3, (2, *codes.shape))]
            return low | high << 4
        return torch.randint(-1, 2, codes.shape).to(codes.dtype)

    def ones(group: Tensor | None) -> Tensor | None:
        return None if group is None else torch.ones(group.shape).to(group.dtype)

    weights = replace(
        random,
        w13=small(random.w13),
        w2=small(random.w2),
        w13_scale=torch.ones_like(random.w13_scale),
        w2_scale=torch.ones_like(random.w2_scale),
        w13_group=ones(random.w13_group),
        w2_group=ones(random.w2_group),
    )
    ids, _ = route(t, 2, e)
    factors = torch.ones(t, 2)
    x = torch.randint(-1, 2, (t, h)).bfloat16()
    qmax = 448 if scheme.weight_dtype == torch.float8_e4m3fn else 127
    if scheme.quantizes_activations:  # scales become powers of two
        step = 64.0 if qmax == 127 else 256.0
        x[:, ::64] = 1.0
        x *= qmax / step
    actual = run(x, ids, factors, weights, "relu", None)
    expected = reference.fused_experts(x, ids, factors, weights, "relu")
    if scheme.quantizes_activations:
        assert_close(actual, expected, scheme)  # h is not made of powers of two
    else:
        assert torch.equal(actual, expected)


@EVERY_SCHEME
@pytest.mark.parametrize("t", [1, 3, 40])
@pytest.mark.parametrize("each", [False, True])
def test_expert_linear(scheme: OnlineQuantScheme, t: int, each: bool) -> None:
    from moeq.kernels import triton

    weights = random_weights(scheme, 4, 96, 152, bias=torch.bfloat16)
    ids, _ = route(t, 3, 4)
    ids[0, 0] = -1
    x = torch.randn(t, 3 if each else 1, 96).bfloat16()
    moved = to_device(weights)
    args = (x, ids, weights.w13, weights.w13_scale, weights.w13_group, weights.b13, scheme, 2)
    matrices = (moved.w13, moved.w13_scale, moved.w13_group, moved.b13)
    actual = triton.expert_linear(x.to(DEVICE), ids.to(DEVICE), *matrices, scheme, 2).cpu()
    assert bool((actual[0, 0] == 0).all())
    assert_close(actual, reference.expert_linear(*args), scheme)


@pytest.mark.parametrize(
    "scheme", [s for s in OnlineQuantScheme if s.covers("linear")], ids=lambda s: s.value
)
@pytest.mark.parametrize("shape", [(0, 136), (1, 136), (2, 3, 136), (70, 136)])
def test_linear(scheme: OnlineQuantScheme, shape: tuple[int, ...]) -> None:
    from moeq.kernels import triton

    weights = to_device(random_weights(scheme, 1, 200, 136, bias=torch.bfloat16))
    w, scale, bias = weights.w2[0], weights.w2_scale[0], weights.b2
    assert bias is not None
    group = None if weights.w2_group is None else weights.w2_group[0]
    x = torch.randn(shape).bfloat16()
    actual = triton.linear(x.to(DEVICE), w, scale, group, bias[0], scheme).cpu()
    group = None if group is None else group.cpu()
    expected = reference.linear(x, w.cpu(), scale.cpu(), group, bias[0].cpu(), scheme)
    assert actual.shape == expected.shape
    if x.numel():
        assert_close(actual, expected, scheme)


@needs_gpu
@EVERY_SCHEME
@pytest.mark.parametrize(
    ("e", "k", "h", "i"),
    [(128, 8, 2048, 768), (8, 2, 1024, 3584), (32, 4, 2880, 2880), (513, 6, 256, 384)],
)
def test_real_shapes_on_a_gpu(scheme: OnlineQuantScheme, e: int, k: int, h: int, i: int) -> None:
    from moeq.kernels import triton

    with DEVICE:
        weights = random_weights(scheme, e, h, i)
        for t, skewed in itertools.product((1, 4, 33, 300, 2500), (False, True)):
            logits = torch.randn(t, e) + torch.linspace(4, -4, e) * skewed
            factors, ids = logits.topk(k)
            args = (torch.randn(t, h).bfloat16(), ids, factors.softmax(-1))
            actual = triton.fused_experts(*args, weights, "silu")
            assert_close(actual, reference.fused_experts(*args, weights, "silu"), scheme)
            for _ in range(3):
                assert torch.equal(actual, triton.fused_experts(*args, weights, "silu"))


@needs_gpu
@pytest.mark.parametrize("family", ["decode", "decode_groups", "mxfp4"])
def test_decoded_parts_for_very_many_rows(family: str) -> None:
    from moeq.kernels.triton.layer import LibraryPath

    scheme = SCHEMES[family]
    weights = random_weights(scheme, 4, 512, 1280, bias=torch.bfloat16)
    ids, factors = route(900, 2, 4)
    ids[5] = torch.tensor([-1, 9])
    x = torch.randn(900, 512).bfloat16()
    expected = reference.fused_experts(x, ids, factors, weights, "silu")
    for scratch in (1 << 20, 4 << 20, 1 << 30):
        actual = run(x, ids, factors, weights, "silu", LibraryPath(scratch))
        assert_close(actual, expected, scheme)


@FLOATS
@pytest.mark.parametrize("scheme", four_bits.SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize("k", [40, 136, 4160])
def test_every_code_times_every_group_scale(
    dtype: torch.dtype, scheme: OnlineQuantScheme, k: int
) -> None:
    """Products are exact, and so is a sum of one of them: x selects columns."""
    from moeq.kernels import triton
    from moeq.kernels.triton import library

    n = 48
    w = random_weights(scheme, 1, n, k, gated=False)
    assert w.w2_group is not None
    exact = decode(w.w2[0], w.w2_group[0])[:, :k]
    scale, moved = torch.ones(n), to_device(w)
    assert moved.w2_group is not None
    for rows in (1, 70):
        columns = torch.randperm(k)[:rows]
        x = torch.nn.functional.one_hot(columns, k).to(dtype)
        operands = (moved.w2[0], scale.to(DEVICE), moved.w2_group[0], None)
        actual = triton.linear(x.to(DEVICE), *operands, scheme).cpu()
        assert torch.equal(actual.float(), exact.t()[columns])
    if k % 8 == 0:
        tile = library._decode(moved.w2, moved.w2_group, k, 1, 16, 32)
        assert torch.equal(tile[0].cpu().float(), exact[16:])


@needs_gpu
def test_codes_past_two_to_the_31() -> None:
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
    e, h, i = 300, 2048, 2048
    codes = torch.randint(-127, 128, (e, 2 * i, h), dtype=torch.int8, device=DEVICE)
    assert codes.numel() > 2**31
    weights = ExpertWeights(
        scheme,
        codes,
        torch.full((e, 2 * i), 1e-4, device=DEVICE),
        torch.randint(-127, 128, (e, h, i), dtype=torch.int8, device=DEVICE),
        torch.full((e, h), 1e-4, device=DEVICE),
        parts=2,
    )
    from moeq.kernels import triton

    for t in (1, 50, 400):
        ids = torch.full((t, 1), e - 1, device=DEVICE)
        x = torch.randn(t, h, device=DEVICE).bfloat16()
        factors = torch.ones(t, 1, device=DEVICE)
        last = ExpertWeights(
            scheme,
            *(w[-1:] for w in (codes, weights.w13_scale, weights.w2, weights.w2_scale)),
            parts=2,
        )
        expected = reference.fused_experts(x, torch.zeros_like(ids), factors, last, "silu")
        assert_close(triton.fused_experts(x, ids, factors, weights, "silu"), expected, scheme)


@needs_gpu
@EVERY_SCHEME
@pytest.mark.parametrize("t", [1, 40, 1500])
def test_a_cuda_graph_replays_the_same_bits(scheme: OnlineQuantScheme, t: int) -> None:
    from moeq.kernels import triton

    torch.use_deterministic_algorithms(False)  # filling memory is no part of the graph
    weights = to_device(random_weights(scheme, 16, 512, 384))
    x = torch.randn(t, 512, device=DEVICE).bfloat16()
    ids, factors = (v.to(DEVICE) for v in route(t, 4, 16))
    triton.fused_experts(x, ids, factors, weights, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.fused_experts(x, ids, factors, weights, "silu")
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        new_ids, _ = route(t, 4, 16)
        ids.copy_(new_ids)
        graph.replay()
        assert torch.equal(out, triton.fused_experts(x, ids, factors, weights, "silu"))


def test_granularities_all_have_a_family() -> None:
    from moeq.kernels.triton import plans

    for scheme in OnlineQuantScheme:
        math = plans.arithmetic(DEVICE, scheme)
        for arithmetic in (math, replace(math, codes=False)):
            assert plans._family(scheme, arithmetic) in plans._tilings()
    assert set(Granularity) == {s.granularity for s in OnlineQuantScheme}
