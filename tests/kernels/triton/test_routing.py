"""Rows sorted by expert, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.device import DEVICE, needs_gpu


def check(ids: Tensor, num_experts: int, block_m: int) -> None:
    from moeq.kernels.triton.routing import route

    routing = route(ids.to(DEVICE), num_experts, block_m)
    pairs, positions, offsets, tile_expert, tile_row = (t.cpu() for t in routing)
    flat = ids.flatten()
    local = (flat >= 0) & (flat < num_experts)
    rows = int(local.sum())
    order = torch.argsort(torch.where(local, flat, num_experts), stable=True)[:rows]
    assert torch.equal(pairs[:rows].long(), order)
    assert torch.equal(positions[order].long(), torch.arange(rows))
    counts = torch.bincount(flat[local], minlength=num_experts)
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    tiles = [
        (expert, int(offsets[expert]) + start)
        for expert, count in enumerate(counts.tolist())
        for start in range(0, count, block_m)
    ]
    assert len(tiles) <= routing.tiles
    assert tile_expert.tolist() == [e for e, _ in tiles] + [-1] * (routing.tiles - len(tiles))
    assert tile_row[: len(tiles)].tolist() == [row for _, row in tiles]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("t", "k", "num_experts", "block_m"),
    [
        (1, 1, 1, 16),
        (5, 3, 7, 16),
        (100, 8, 12, 16),
        (513, 8, 40, 128),  # counted by a kernel of their own
        (2100, 2, 3, 64),
    ],
)
def test_random_ids_some_of_them_of_other_ranks(
    t: int, k: int, num_experts: int, block_m: int, dtype: torch.dtype
) -> None:
    ids = torch.randint(-1, num_experts + 1, (t, k), dtype=dtype)
    check(ids, num_experts, block_m)


@pytest.mark.parametrize("t", [3, 700])
def test_all_tokens_to_one_expert(t: int) -> None:
    check(torch.full((t, 8), 4), 6, 16)


@pytest.mark.parametrize("t", [3, 700])
def test_all_tokens_to_other_ranks(t: int) -> None:
    check(torch.full((t, 8), -1), 6, 16)


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_that_place_several_chunks(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeq.kernels.triton import routing

    monkeypatch.setattr(routing, "_FEW", 100)
    monkeypatch.setattr(routing, "_PROGRAMS", programs)
    check(torch.randint(-1, 8, (150, 4)), 7, 16)


@needs_gpu
@pytest.mark.parametrize("num_experts", [8, 100, 128, 512, 4096])
@pytest.mark.parametrize("t", [1, 512, 513, 16384])
def test_at_full_size(t: int, num_experts: int) -> None:
    check(torch.randint(-1, num_experts + 1, (t, 8)), num_experts, 128)
