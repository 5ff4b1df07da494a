"""From the router's choice to rows sorted by expert, on the device, the same on every run.

A *pair* is (token, slot), numbered token * k + slot. Routing gives

    pairs       int32 [P]        the pair in every sorted row; rows of one expert are contiguous,
                                 and in the order of their tokens
    positions   int32 [P]        the sorted row of every pair (undefined for pairs of other ranks)
    offsets     int32 [E + 1]    first row of every expert; offsets[E] rows in all
    tile_expert int32 [tiles]    expert of every tile of BLOCK_M rows; -1 past the last tile
    tile_row    int32 [tiles]    first row of every tile

One program per expert (and segment of pairs) counts what comes before its rows and ranks its own,
so that no order of programs shows (sums of counts are the only atomics). Ids outside 0..E-1 belong
to other ranks: their pairs are in no row. The number of tiles is bounded on the host and never read
back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 4096
"""Pairs that one kernel sorts; more are counted by a kernel of their own first."""

_CHUNK = 1024
"""Pairs that a program of the counting kernel counts, and that any program ranks at a time."""

_SEGMENT = 4
"""Chunks that a program of the placing kernel ranks, where there are many pairs."""


class Routing(NamedTuple):
    """See the module's docstring."""

    pairs: Tensor
    positions: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor

    @property
    def tiles(self) -> int:
        """How many tiles there may be: the rows of a launch grid."""
        return self.tile_expert.shape[0]


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Tiles that `num_pairs` rows can fall into: each expert has at most one that is not full."""
    return min(num_pairs, num_pairs // block_m + num_experts)


def route(topk_ids: Tensor, num_experts: int, block_m: int, *, pdl: bool = False) -> Routing:
    """Sort pairs by expert.

    Args:
        topk_ids: [T, k] integer, T * k > 0, contiguous.
        num_experts: E, held here.
        block_m: rows of a tile.
        pdl: the next kernel may start before this one has ended.
    """
    p = topk_ids.numel()
    tiles = max_tiles(p, num_experts, block_m)
    new = torch.empty(
        2 * p + num_experts + 1 + 2 * tiles, dtype=torch.int32, device=topk_ids.device
    )
    routing = Routing(*new.split([p, p, num_experts + 1, tiles, tiles]))
    padded = triton.next_power_of_2(max(num_experts, 16))
    if p <= _FEW:
        chunk = triton.next_power_of_2(max(p, 32))
        _place[(num_experts, 1)](
            topk_ids, topk_ids, topk_ids, *routing, p, num_experts, tiles, block_m,
            PADDED=padded, COUNTED=False, CHUNKS=1, CHUNK=chunk, COLUMN=1, TRIGGER=pdl,
            num_warps=4 if chunk <= 1024 else 8,
        )  # fmt: skip
        return routing
    chunks = triton.cdiv(p, _CHUNK)
    device = topk_ids.device
    small_ids = torch.empty(p, dtype=torch.int16, device=device)
    counts = torch.empty(chunks, num_experts, dtype=torch.int32, device=device)
    totals = torch.zeros(num_experts, dtype=torch.int32, device=device)
    _count[(chunks,)](
        topk_ids, small_ids, counts, totals, p, num_experts,
        PADDED=padded, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    _place[(num_experts, triton.cdiv(chunks, _SEGMENT))](
        small_ids, counts, totals, *routing, p, num_experts, tiles, block_m,
        PADDED=padded, COUNTED=True, CHUNKS=_SEGMENT, CHUNK=_CHUNK,
        COLUMN=triton.next_power_of_2(chunks), TRIGGER=pdl, num_warps=4,
    )  # fmt: skip
    return routing


@triton.jit
def _count(
    ids, small_ids, counts, totals, P, E, PADDED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Histogram of every chunk, and of all of them (sums of integers: any order gives the same);
    and the ids in 16 bits, because every expert's programs will read all of them."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + i, mask=i < P, other=-1)
    local = (i < P) & (expert >= 0) & (expert < E)
    expert = tl.where(local, expert, -1).to(tl.int32)
    tl.store(small_ids + i, expert.to(tl.int16), mask=i < P)
    found = tl.histogram(expert, PADDED, mask=local)
    every = tl.arange(0, PADDED)
    tl.store(counts + tl.program_id(0) * E + every, found, mask=every < E)
    tl.atomic_add(totals + every, found, mask=every < E)


@triton.jit
def _place(
    ids,
    counts,
    totals,
    pairs,
    positions,
    offsets,
    tile_expert,
    tile_row,
    P,
    E,
    tiles,
    BLOCK_M,
    PADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMN: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    """Rows, and tiles, of expert program_id(0); of the CHUNKS chunks of program_id(1)."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    me = tl.program_id(0)
    every = tl.arange(0, PADDED)
    first_chunk = tl.program_id(1) * CHUNKS
    if COUNTED:
        total = tl.load(totals + every, mask=every < E, other=0)
        c = tl.arange(0, COLUMN)
        earlier = tl.sum(tl.load(counts + c * E + me, mask=c < first_chunk, other=0), 0)
    else:
        i = tl.arange(0, CHUNK)
        expert = tl.load(ids + i, mask=i < P, other=-1)
        local = (i < P) & (expert >= 0) & (expert < E)
        total = tl.histogram(tl.where(local, expert, -1).to(tl.int32), PADDED, mask=local)
        earlier = 0
    mine = tl.sum(tl.where(every == me, total, 0), 0)
    first = tl.sum(tl.where(every < me, total, 0), 0)

    row = first + earlier
    for chunk in tl.static_range(CHUNKS):
        i = (first_chunk + chunk) * CHUNK + tl.arange(0, CHUNK)
        is_mine = (i < P) & (tl.load(ids + i, mask=i < P, other=-1) == me)
        rank = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(pairs + row + rank - 1, i, mask=is_mine)
        tl.store(positions + i, row + rank - 1, mask=is_mine)
        row += tl.sum(is_mine.to(tl.int32), 0)

    if first_chunk == 0:
        tl.store(offsets + me, first)
        each = tl.cdiv(total, BLOCK_M)
        base = tl.sum(tl.where(every < me, each, 0), 0)
        my_tiles = tl.cdiv(mine, BLOCK_M)
        for at in range(0, my_tiles, CHUNK):
            i = at + tl.arange(0, CHUNK)
            tl.store(tile_expert + base + i, me, mask=i < my_tiles)
            tl.store(tile_row + base + i, first + i * BLOCK_M, mask=i < my_tiles)
        if me == E - 1:
            tl.store(offsets + E, first + mine)
            for at in range(base + my_tiles, tiles, CHUNK):
                i = at + tl.arange(0, CHUNK)
                tl.store(tile_expert + i, -1, mask=i < tiles)
