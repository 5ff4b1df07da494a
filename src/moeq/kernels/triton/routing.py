"""From the router's choice to rows sorted by expert, on the device, without atomics.

A *pair* is (token, slot), numbered token * k + slot. Routing gives

    pairs       int32 [P]        the pair in every sorted row; rows of one expert are contiguous, and
                                 in the order of their tokens
    positions   int32 [P]        the sorted row of every pair (undefined for pairs of other ranks)
    offsets     int32 [E + 1]    first row of every expert; offsets[E] rows in all
    tile_expert int32 [tiles]    expert of every tile of BLOCK_M rows; -1 past the last tile
    tile_row    int32 [tiles]    first row of every tile

One program per expert (and segment of pairs) counts what comes before its rows and ranks its own,
so that the result is the same from run to run. Ids outside 0..E-1 belong to other ranks: their
pairs are in no row. The number of tiles is bounded on the host and never read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024
"""Pairs looked at at a time."""

_WARPS = 4

_SEGMENT = 4096
"""Pairs of one program; more pairs are counted by a kernel of its own first."""


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


def route(topk_ids: Tensor, num_experts: int, block_m: int) -> Routing:
    """Sort pairs by expert.

    Args:
        topk_ids: [T, k] integer, T * k > 0, contiguous.
        num_experts: E, held here.
        block_m: rows of a tile.
    """
    p = topk_ids.numel()
    tiles = max_tiles(p, num_experts, block_m)
    new = torch.empty(
        2 * p + num_experts + 1 + 2 * tiles, dtype=torch.int32, device=topk_ids.device
    )
    routing = Routing(*new.split([p, p, num_experts + 1, tiles, tiles]))
    segment = max(_SEGMENT, triton.next_power_of_2(triton.cdiv(p, 16)))
    segments = triton.cdiv(p, segment)
    padded = triton.next_power_of_2(max(num_experts, 16))
    chunk = min(_CHUNK, triton.next_power_of_2(max(p, 32)))
    counts = routing.pairs
    if segments > 1:
        counts = torch.empty(segments, padded, dtype=torch.int32, device=topk_ids.device)
        _count[(segments,)](topk_ids, counts, p, num_experts, segment, padded, chunk, num_warps=4)
    _place[(num_experts, segments)](
        topk_ids,
        counts,
        *routing,
        p,
        num_experts,
        tiles,
        segment,
        block_m,
        padded,
        triton.next_power_of_2(segments),
        chunk,
        num_warps=_WARPS,
    )
    return routing


@triton.jit
def _histogram(ids, start, stop, E, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """How many ids in [start, stop) name each expert: int32 [PADDED]."""
    counts = tl.zeros((PADDED,), tl.int32)
    for at in range(start, stop, CHUNK):
        i = at + tl.arange(0, CHUNK)
        expert = tl.load(ids + i, mask=i < stop, other=-1).to(tl.int32)
        counts += tl.histogram(expert, PADDED, mask=(expert >= 0) & (expert < E))
    return counts


@triton.jit
def _count(ids, counts, P, E, segment, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    start = tl.program_id(0) * segment
    found = _histogram(ids, start, tl.minimum(start + segment, P), E, PADDED, CHUNK)
    tl.store(counts + tl.program_id(0) * PADDED + tl.arange(0, PADDED), found)


@triton.jit
def _place(
    ids,
    counts,
    pairs,
    positions,
    offsets,
    tile_expert,
    tile_row,
    P,
    E,
    tiles,
    segment,
    BLOCK_M,
    PADDED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    me = tl.program_id(0)
    my_segment = tl.program_id(1)
    every = tl.arange(0, PADDED)
    start = my_segment * segment
    stop = tl.minimum(start + segment, P)
    if SEGMENTS == 1:
        total = _histogram(ids, 0, P, E, PADDED, CHUNK)
        earlier = 0
    else:
        s = tl.arange(0, SEGMENTS)
        table = tl.load(
            counts + s[:, None] * PADDED + every[None, :],
            mask=(s < tl.num_programs(1))[:, None],
            other=0,
        )
        total = tl.sum(table, 0)
        before = (s < my_segment)[:, None] & (every == me)[None, :]
        earlier = tl.sum(tl.sum(tl.where(before, table, 0), 1), 0)
    mine = tl.sum(tl.where(every == me, total, 0), 0)
    first = tl.sum(tl.where(every < me, total, 0), 0)

    row = first + earlier
    for at in range(start, stop, CHUNK):
        i = at + tl.arange(0, CHUNK)
        is_mine = tl.load(ids + i, mask=i < stop, other=-1).to(tl.int32) == me
        rank = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(pairs + row + rank - 1, i, mask=is_mine)
        tl.store(positions + i, row + rank - 1, mask=is_mine)
        row += tl.sum(is_mine.to(tl.int32), 0)

    if my_segment == 0:
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
