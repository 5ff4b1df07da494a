"""Four-bit codes arranged for the CPU: there and back the same bytes, and the same products."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels import cpu, cpu_int4
from moeq.schemes import OnlineQuantScheme
from tests.kernels.layers import random_weights, route, truth
from tests.kernels.test_cpu import assert_close

INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY

pytestmark = pytest.mark.skipif(
    cpu_int4._block_rows() == 0, reason="PyTorch's operator is of no known layout on this CPU"
)

EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


def arranged(w: ExpertWeights) -> ExpertWeights:
    assert w.w13_group is not None and w.w2_group is not None
    w13, w13_group = cpu_int4.arrange(w.w13.clone(), w.w13_group.clone())
    w2, w2_group = cpu_int4.arrange(w.w2.clone(), w.w2_group.clone())
    return dataclasses.replace(w, w13=w13, w13_group=w13_group, w2=w2, w2_group=w2_group)


def random_matrices(*shape: int) -> tuple[Tensor, Tensor]:
    *lead, n, k = shape
    codes = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8)
    scale = torch.randint(8, 127, (*lead, n, k // 32), dtype=torch.uint8)
    scale |= torch.randint(0, 2, scale.shape, dtype=torch.uint8) << 7
    return codes, scale.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("lead", [(), (1,), (3,)])
@pytest.mark.parametrize(("n", "k"), [(64, 32), (128, 96), (192, 64), (1536, 128), (64, 2048)])
def test_there_and_back(
    lead: tuple[int, ...], n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(n)
    monkeypatch.setattr(cpu_int4, "_CHUNK", 3000)  # several
    assert cpu_int4.can_arrange(torch.float8_e4m3fn, n, k)
    codes, scale = random_matrices(*lead, n, k)
    before = codes.clone(), scale.clone()
    there, there_scale = cpu_int4.arrange(codes, scale)
    assert cpu_int4.is_arranged(there) and not cpu_int4.is_arranged(codes)
    assert there.shape == (*lead, n, k // 8) and there_scale.shape == (*lead, k // 32, n)
    assert there.data_ptr() == codes.data_ptr() and there_scale.data_ptr() == scale.data_ptr()
    assert not torch.equal(codes, before[0])
    back, back_scale = cpu_int4.restore(there, there_scale)
    assert back.data_ptr() == codes.data_ptr() and back.dtype == torch.uint8
    assert torch.equal(back, before[0])
    assert torch.equal(back_scale.view(torch.uint8), before[1].view(torch.uint8))


def test_the_arrangement_is_pytorchs_own() -> None:
    torch.manual_seed(0)
    codes, scale = random_matrices(192, 96)
    whole = torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    found, _ = cpu_int4.arrange(codes, scale)
    assert torch.equal(found.view(torch.uint8).flatten(), expected.flatten())


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 64), (80, 64), (0, 64), (128, 0), (128, 80)])
def test_what_has_no_whole_blocks_and_groups_stays(n: int, k: int) -> None:
    assert not cpu_int4.can_arrange(torch.float8_e4m3fn, n, k)


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("t", "k", "e", "h", "i", "gated", "bias"),
    [
        (1, 2, 8, 64, 192, True, False),
        (1, 1, 1, 128, 64, False, True),
        (5, 2, 8, 192, 96 * 2, True, True),
        (90, 3, 3, 256, 128, True, False),  # 90 rows for every expert: decoded tiles
        (200, 1, 1, 64, 64, False, True),
    ],
)
def test_fused_experts(
    dtype: torch.dtype, t: int, k: int, e: int, h: int, i: int, gated: bool, bias: bool
) -> None:
    torch.manual_seed(t)
    w = random_weights(INT4, e, h, i, gated=gated, bias=dtype if bias else None)
    x, (ids, topk_weights) = torch.randn(t, h).to(dtype), route(t, k, e)
    out = cpu.fused_experts(x, ids, topk_weights, arranged(w), "silu")
    assert_close(out, truth(x, ids, topk_weights, w, "silu"), dtype)
    assert torch.equal(out, cpu.fused_experts(x, ids, topk_weights, arranged(w), "silu"))


@EVERY_DTYPE
def test_every_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens to one expert, on both sides of the crossover, tiles of some blocks."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_int4, "_TILE", 2 * 64 * 128)
    w = random_weights(INT4, 2, 128, 192)
    most = cpu_int4._OPERATOR_ROWS
    for rows in (1, 2, 3, 4, 5, 16, most, most + 1, 2 * most + 7):
        x = torch.randn(rows, 128).to(dtype)
        ids, ones = torch.ones(rows, 1).int(), torch.ones(rows, 1)
        out = cpu.fused_experts(x, ids, ones, arranged(w), "silu")
        assert_close(out, truth(x, ids, ones, w, "silu"), dtype)


def test_expert_linear_and_linear() -> None:
    torch.manual_seed(0)
    w = random_weights(INT4, 3, 128, 64, bias=torch.bfloat16)
    a = arranged(w)
    assert w.w13_group is not None and a.w13_group is not None
    x, (ids, _) = torch.randn(6, 1, 128).bfloat16(), route(6, 2, 3)
    ids[2, 1] = -1
    found, expected = (
        cpu.expert_linear(x, ids, v.w13, v.w13_scale, v.w13_group, v.b13, INT4, 2) for v in (a, w)
    )
    assert (found[2, 1] == 0).all()
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-4)
    one, other = (
        cpu.linear(x, v.w13[1], v.w13_scale[1], group[1], None, INT4)
        for v, group in ((a, a.w13_group), (w, w.w13_group))
    )
    torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-4)
    assert cpu.linear(x[:0], a.w13[1], a.w13_scale[1], a.w13_group[1], None, INT4).shape[0] == 0


def test_sums_of_large_and_small_weights_are_as_exact() -> None:
    """The smallest group scale beside the largest: what the operator is given is exact."""
    scale = torch.tensor([[0x08, 0x7E]] * 64, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.full((64, 32), 0x99, dtype=torch.uint8)  # ones
    codes, scale = cpu_int4.arrange(codes, scale)
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 5], x[1, 40] = 1, 1
    y = cpu_int4.runs_of_arranged(x, [(0, 0, 2)], codes[None], scale[None])
    assert torch.equal(y, torch.tensor([2.0**-6, 448.0]).bfloat16()[:, None].expand(2, 64))
