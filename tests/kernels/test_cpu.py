"""The CPU kernels, every path of them: few rows and many, aligned and not, with VNNI and without.

What they must equal is computed here in fp64, and with activations unquantized where the scheme is
fp8 (the CPU is more exact than that scheme asks); for int8 activations it is `reference`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels import cpu, reference
from moeq.kernels.activations import ACTIVATIONS
from moeq.schemes import OnlineQuantScheme
from tests.kernels.layers import dequantized, random_weights, route, truth

W8A16 = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
W8A8 = OnlineQuantScheme.INT8_PER_CHANNEL
FP8 = OnlineQuantScheme.FP8_PER_CHANNEL
FP8_BLOCK = OnlineQuantScheme.FP8_PER_BLOCK

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}
"""|error| / |truth| in the 2-norm. bf16: products, h, and the output are rounded, 2^-9 at most
each, the scale of a block folded in likewise; fp16 the same with 2^-12. fp32 sums some hundred
products. int8 activations add nothing: their codes are the same integers on both sides."""

WITHOUT_VNNI = 2
"""times that, in bf16: products of int8 are rounded to bf16 before they are quantized again, and
about half of the codes come out one off."""


def w13_of(w: ExpertWeights) -> tuple[Tensor, Tensor, Tensor | None]:
    return w.w13, w.w13_scale, w.w13_group


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    tolerance = TOLERANCE[dtype] * (1 if cpu._int_mm_is_exact() else WITHOUT_VNNI)
    assert error < tolerance, f"{error:.2e}"


@EVERY_SCHEME
@EVERY_DTYPE
@pytest.mark.parametrize(
    ("t", "k", "e", "h", "i", "gated", "bias"),
    [
        (1, 2, 8, 96, 200, True, False),  # decode: every run one row; 16 does not divide 200
        (1, 1, 1, 64, 48, False, True),
        (5, 2, 8, 200, 96, True, True),
        (90, 3, 3, 256, 144, True, False),  # 90 rows for every expert
        (40, 1, 4, 130, 260, False, False),  # partial blocks both ways
        (33, 8, 16, 64, 64, True, True),
    ],
)
def test_fused_experts(
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
    torch.manual_seed(t)
    w = random_weights(scheme, e, h, i, gated=gated, bias=dtype if bias else None)
    x, (ids, topk_weights) = torch.randn(t, h).to(dtype), route(t, k, e)
    expected = truth(x, ids, topk_weights, w, "silu")
    before = x.clone()
    out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    assert_close(out, expected, dtype)
    assert torch.equal(x, before)
    assert torch.equal(out, cpu.fused_experts(x, ids, topk_weights, w, "silu"))


@EVERY_SCHEME
@EVERY_DTYPE
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("h", "i"), [(33, 1), (40, 7), (31, 16), (1, 17), (70, 31)])
def test_narrow_layers(
    scheme: OnlineQuantScheme, dtype: torch.dtype, gated: bool, h: int, i: int
) -> None:
    """Less than a group, and rows that end within one; what fills them up is not read."""
    torch.manual_seed(h)
    w = random_weights(scheme, 3, h, i, gated=gated, bias=dtype)
    for t in (1, 9):
        x, (ids, topk_weights) = torch.randn(t, h).to(dtype), route(t, 2, 3)
        out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
        assert_close(out, truth(x, ids, topk_weights, w, "silu"), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    torch.manual_seed(0)
    w = random_weights(W8A16, 4, 64, 32)
    x, (ids, topk_weights) = torch.randn(6, 64), route(6, 2, 4)
    expected = truth(x, ids, topk_weights, w, activation)
    assert_close(cpu.fused_experts(x, ids, topk_weights, w, activation), expected, torch.float32)


@EVERY_SCHEME
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 40])
def test_every_number_of_rows(scheme: OnlineQuantScheme, rows: int) -> None:
    """All tokens to one expert, on both sides of every crossover."""
    torch.manual_seed(rows)
    w = random_weights(scheme, 3, 144, 128)
    x, ids, ones = torch.randn(rows, 144).bfloat16(), torch.ones(rows, 1).int(), torch.ones(rows, 1)
    out = cpu.fused_experts(x, ids, ones, w, "silu")
    assert_close(out, truth(x, ids, ones, w, "silu"), torch.bfloat16)


@EVERY_SCHEME
@EVERY_DTYPE
def test_small_tiles_and_chunks(
    scheme: OnlineQuantScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loop runs more than once, and runs are cut."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "_TILE", 30 * 160)
    monkeypatch.setattr(cpu, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(cpu, "_RUN_ROWS", 20)
    w = random_weights(scheme, 3, 160, 136)
    ids = torch.tensor([[0, 1]] * 30 + [[1, 2]] * 3)
    x, topk_weights = torch.randn(33, 160).to(dtype), torch.rand(33, 2)
    out = cpu.fused_experts(x, ids, topk_weights, w, "gelu")
    assert_close(out, truth(x, ids, topk_weights, w, "gelu"), dtype)


@pytest.mark.parametrize("t", [3, 40], ids=["sorted by Python", "sorted by torch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_ids_of_other_ranks_add_nothing(t: int, dtype: torch.dtype) -> None:
    torch.manual_seed(t)
    w = random_weights(W8A16, 4, 64, 48, bias=torch.float32)
    x, (ids, topk_weights) = torch.randn(t, 64), route(t, 3, 4)
    ids[::2, 1], ids[1::2, 0], ids[0] = -1, 4, 1000
    topk_weights[ids == -1] = float("nan")
    out = cpu.fused_experts(x, ids.to(dtype), topk_weights, w, "silu")
    assert_close(out, truth(x, ids, topk_weights, w, "silu"), torch.float32)
    assert torch.equal(out[0], torch.zeros(64))
    y = cpu.expert_linear(x[:, None], ids, w.w13, w.w13_scale, None, w.b13, W8A16, 2)
    assert (y[ids < 0] == 0).all()
    assert (y[ids == 1].abs().sum(-1) > 0).all()


def test_one_token_with_an_id_of_another_rank() -> None:
    torch.manual_seed(0)
    w = random_weights(W8A8, 4, 64, 48)
    x, ids, topk_weights = torch.randn(1, 64), torch.tensor([[3, 4, 0, -1]]), torch.rand(1, 4)
    out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    assert_close(out, truth(x, ids, topk_weights, w, "silu"), torch.float32)
    ours = cpu.fused_experts(x, ids[:, ::2], topk_weights[:, ::2], w, "silu")
    torch.testing.assert_close(out, ours, rtol=1e-6, atol=0)  # summed in another order


def test_an_expert_chosen_twice() -> None:
    w = random_weights(W8A16, 2, 32, 32)
    x, ids, topk_weights = torch.randn(2, 32), torch.tensor([[1, 1], [0, 1]]), torch.rand(2, 2)
    out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    assert_close(out, truth(x, ids, topk_weights, w, "silu"), torch.float32)


@EVERY_SCHEME
def test_nothing_to_do(scheme: OnlineQuantScheme) -> None:
    w = random_weights(scheme, 2, 64, 32)
    x, none = torch.zeros(0, 64, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64)
    assert cpu.fused_experts(x, none, none.float(), w, "silu").shape == (0, 64)
    y = cpu.expert_linear(x[:, None], none, *w13_of(w), None, scheme, 2)
    assert y.shape == (0, 2, 64)
    elsewhere = torch.full((3, 2), -1)
    out = cpu.fused_experts(torch.randn(3, 64), elsewhere, torch.rand(3, 2), w, "silu")
    assert torch.equal(out, torch.zeros(3, 64))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    w = random_weights(W8A8, 6, 96, 64)
    x, (ids, topk_weights) = torch.randn(30, 96).bfloat16(), route(30, 2, 6)
    out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    order = torch.randperm(30)
    moved = cpu.fused_experts(x[order], ids[order], topk_weights[order], w, "silu")
    assert torch.equal(moved, out[order])
    x[7] = float("nan")
    spoiled = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    assert spoiled[7].isnan().all()
    assert torch.equal(spoiled[8:], out[8:])


@EVERY_SCHEME
def test_rows_of_zeros_and_of_extremes(scheme: OnlineQuantScheme) -> None:
    torch.manual_seed(0)
    w = random_weights(scheme, 2, 64, 32)
    for rows in (1, 6):
        x = torch.randn(rows, 64)
        ids, ones = torch.zeros(rows, 1).long(), torch.ones(rows, 1)
        assert torch.equal(cpu.fused_experts(x * 0, ids, ones, w, "silu"), x * 0)
        for size in (2.0**60, 2.0**-60):
            x_b = (x * size).bfloat16()
            y = cpu.expert_linear(x_b[:, None], ids, *w13_of(w), None, scheme, 2)
            one = cpu.expert_linear(x.bfloat16()[:, None], ids, *w13_of(w), None, scheme, 2)
            assert torch.equal(y, one * size)  # powers of two: nothing overflows, nothing is lost


@EVERY_SCHEME
@EVERY_DTYPE
def test_expert_linear(scheme: OnlineQuantScheme, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = random_weights(scheme, 4, 96, 130, bias=dtype)
    for t in (1, 40):
        ids, _ = route(t, 2, 4)
        for j in (1, 2):
            x = torch.randn(t, j, 96).to(dtype)
            out = cpu.expert_linear(x, ids, *w13_of(w), w.b13, scheme, 2)
            exact = reference.expert_linear(x, ids, *w13_of(w), w.b13, scheme, 2)
            if scheme is not W8A8:
                matrix, _ = dequantized(w)
                assert w.b13 is not None
                rows = x.expand(t, 2, 96).double()[..., None]
                exact = (matrix[ids] @ rows)[..., 0] + w.b13[ids]
            assert_close(out, exact.double(), dtype)


@EVERY_SCHEME
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 9, 96), (0, 96), (3, 0, 96)], ids=str)
def test_linear(scheme: OnlineQuantScheme, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w = random_weights(scheme, 1, 96, 200, gated=False, bias=torch.float32)
    assert w.b13 is not None
    x = torch.randn(shape)
    one = [None if tensor is None else tensor[0] for tensor in w13_of(w)]
    out = cpu.linear(x, *one, w.b13[0], scheme)
    assert out.shape == (*shape[:-1], 200)
    if scheme is W8A8:
        exact = reference.linear(x, *one, w.b13[0], scheme).double()
    else:
        matrix, _ = dequantized(w)
        exact = x.double() @ matrix[0].T + w.b13[0]
    if x.numel():
        assert_close(out, exact, torch.float32)


def test_linear_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_RUN_ROWS", 4)
    w = random_weights(W8A8, 1, 64, 32, gated=False)
    x = torch.randn(32, 64).bfloat16()[::3]  # not contiguous
    out = cpu.linear(x, w.w13[0], w.w13_scale[0], None, None, W8A8)
    exact = reference.linear(x, w.w13[0], w.w13_scale[0], None, None, W8A8)
    assert_close(out, exact.double(), torch.bfloat16)


def test_fp8_codes_decode_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    decoded = cpu._decode_fp8(codes, torch.empty(3, 256, dtype=torch.float16))
    finite = ~codes.float().isnan()
    assert int(finite.sum()) == 254
    assert torch.equal(decoded.float()[finite] * 256, codes.float()[finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_vnni(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `_int_mm` saturates, integers are multiplied as floats."""
    torch.manual_seed(0)
    w = random_weights(W8A8, 4, 112, 64)
    for t in (1, 60):
        x, (ids, topk_weights) = torch.randn(t, 112).to(dtype), route(t, 2, 4)
        expected = truth(x, ids, topk_weights, w, "silu")
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_int_mm_is_exact", lambda: False)
            patch.setattr(torch, "_int_mm", None)
            assert_close(cpu.fused_experts(x, ids, topk_weights, w, "silu"), expected, dtype)


@EVERY_SCHEME
def test_weights_at_any_address(scheme: OnlineQuantScheme) -> None:
    """Tensors in a memory-mapped file lie where the file has them; a kernel of PyTorch that we call
    crashes on those, so we must not."""
    torch.manual_seed(0)
    w = random_weights(scheme, 3, 64, 32)

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 64, dtype=t.dtype)
        offset = (8 - room.data_ptr()) % 64
        copy = room[offset : offset + t.numel()].view(t.shape)
        assert copy.data_ptr() % 64 == 8
        return copy.copy_(t)

    moved = replace(w, w13=shifted(w.w13), w2=shifted(w.w2))
    x, (ids, topk_weights) = torch.randn(4, 64).bfloat16(), route(4, 2, 3)
    out = cpu.fused_experts(x, ids, topk_weights, moved, "silu")
    assert_close(out, truth(x, ids, topk_weights, w, "silu"), torch.bfloat16)


def test_under_another_default_dtype() -> None:
    """transformers sets it while it builds models."""
    torch.manual_seed(0)
    w = random_weights(FP8_BLOCK, 3, 64, 32)
    x, (ids, topk_weights) = torch.randn(4, 64), route(4, 2, 3)
    out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(cpu.fused_experts(x, ids, topk_weights, w, "silu"), out)
    finally:
        torch.set_default_dtype(torch.float32)


def test_fp8_is_more_exact_than_the_scheme() -> None:
    """Near the reference, which quantizes activations as the scheme says: e4m3 rounds by up to
    2^-4, 2^-5.8 in the mean square, for x and again for h."""
    torch.manual_seed(0)
    for scheme in (FP8, FP8_BLOCK, OnlineQuantScheme.FP8_PER_TENSOR):
        w = random_weights(scheme, 4, 256, 128)
        x, (ids, topk_weights) = torch.randn(20, 256), route(20, 2, 4)
        out = cpu.fused_experts(x, ids, topk_weights, w, "silu")
        near = reference.fused_experts(x, ids, topk_weights, w, "silu")
        error = (out - near).norm() / near.norm()
        assert 0.005 < error < 0.08


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_single_column(rows: int) -> None:
    """`torch._int_mm` writes nothing at all for K = 1 (PyTorch 2.13)."""
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL
    x = torch.randn(rows, 1)
    codes = torch.randint(-127, 128, (5, 1), dtype=torch.int8)
    scale = torch.rand(5) + 0.1
    expected = reference.linear(x, codes, scale, None, None, scheme)
    torch.testing.assert_close(cpu.linear(x, codes, scale, None, None, scheme), expected)
