"""From the router's choice to rows sorted by expert, on the device, the same on every run.

A *pair* is (token, slot), numbered token * k + slot. Routing gives

    pairs       int32 [P]        the pair in every sorted row; rows of one expert are contiguous,
                                 and in the order of their tokens
    positions   int32 [P]        the sorted row of every pair (undefined for pairs of other ranks)
    offsets     int32 [E + 1]    first row of every expert; offsets[E] rows in all
    tile_expert int32 [tiles]    expert of every tile of BLOCK_M rows; -1 past the last tile
    tile_row    int32 [tiles]    first row of every tile

A pair's row is the first row of its expert, plus the pairs of that expert in earlier chunks of 64,
plus those before it in its own chunk, found by comparing each with each: nothing depends on the
order in which programs run. Ids outside 0..E-1 belong to other ranks: their pairs are in no row.
The number of tiles is bounded on the host and never read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeq.kernels.triton.rows import launch_options

_FEW = 4096
"""Pairs that every program counts by itself; more are counted by a kernel of their own first."""

_CHUNK = 64
"""Pairs that are compared with each other."""

_PROGRAMS = 1024
"""Programs at most; where there are more chunks, a program takes several."""


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
    counted = p > _FEW
    chunk = min(_CHUNK, triton.next_power_of_2(max(p, 32)))
    chunks = triton.cdiv(p, chunk)
    each = triton.cdiv(chunks, _PROGRAMS) if counted else 1
    programs = triton.cdiv(chunks, each)
    padded = triton.next_power_of_2(max(num_experts, 16))
    counts = totals = topk_ids
    if counted:
        new = torch.empty(programs + 1, num_experts, dtype=torch.int32, device=topk_ids.device)
        counts, totals = new[:programs], new[programs]
        _count[(programs,)](
            topk_ids, counts, p, num_experts, each, PADDED=padded, CHUNK=chunk, TRIGGER=pdl
        )  # fmt: skip
        _add_up[(num_experts,)](
            counts, totals, programs, num_experts,
            COLUMN=triton.next_power_of_2(programs), PDL=pdl, **launch_options(pdl),
        )  # fmt: skip
    _place[(programs,)](
        topk_ids, counts, totals, *routing, p, num_experts, tiles, block_m, each,
        PADDED=padded, COUNTED=counted, ALL=32 if counted else triton.next_power_of_2(max(p, 32)),
        CHUNK=chunk, TILES=max(1, min(64, 8192 // padded)),
        TRIGGER=pdl, WAIT=pdl and counted, num_warps=4 if p <= 256 else 8,
        **launch_options(pdl and counted),
    )  # fmt: skip
    return routing


@triton.jit
def _local(ids, i, stop, E):
    """(expert or -1, whether it is held here) of pairs i < stop."""
    expert = tl.load(ids + i, mask=i < stop, other=-1)
    local = (i < stop) & (expert >= 0) & (expert < E)
    return tl.where(local, expert, -1).to(tl.int32), local


@triton.jit
def _count(
    ids,
    counts,
    P,
    E,
    each,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    """counts [programs, E]: pairs of every expert in the `each` chunks of a program."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    every = tl.arange(0, PADDED)
    found = tl.zeros((PADDED,), tl.int32)
    for chunk in range(each):
        i = (tl.program_id(0) * each + chunk) * CHUNK + tl.arange(0, CHUNK)
        expert, local = _local(ids, i, P, E)
        found += tl.histogram(expert, PADDED, mask=local)
    tl.store(counts + tl.program_id(0) * E + every, found, mask=every < E)


@triton.jit
def _add_up(counts, totals, programs, E, COLUMN: tl.constexpr, PDL: tl.constexpr):
    """Counts of one expert become sums of those before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = counts + tl.arange(0, COLUMN) * E + tl.program_id(0)
    mask = tl.arange(0, COLUMN) < programs
    count = tl.load(at, mask=mask, other=0)
    tl.store(at, tl.cumsum(count, 0) - count, mask=mask)
    tl.store(totals + tl.program_id(0), tl.sum(count, 0))


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
    each,
    PADDED: tl.constexpr,
    COUNTED: tl.constexpr,
    ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    TRIGGER: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Rows of the pairs in `each` chunks, and a share of the tiles. COUNTED: by `_count`; else ALL
    (at least P) pairs are counted here. TILES: tiles made at a time."""
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    if WAIT:
        tl.extra.cuda.gdc_wait()
    me = tl.program_id(0)
    programs = tl.num_programs(0)
    every = tl.arange(0, PADDED)
    if COUNTED:
        total = tl.load(totals + every, mask=every < E, other=0)
        earlier = tl.load(counts + me * E + every, mask=every < E, other=0)
    else:
        every_pair = tl.arange(0, ALL)
        owner, held = _local(ids, every_pair, P, E)
        total = tl.histogram(owner, PADDED, mask=held)
        earlier = tl.histogram(owner, PADDED, mask=held & (every_pair < me * CHUNK))
    start = tl.cumsum(total, 0) - total
    height = tl.cdiv(total, BLOCK_M)
    tile_end = tl.cumsum(height, 0)

    for m in range(me * TILES, tiles, programs * TILES):
        tile = m + tl.arange(0, TILES)
        found = tl.sum((tile_end[:, None] <= tile[None, :]).to(tl.int32), 0)
        inside = found < PADDED
        found = tl.where(inside, found, 0)
        at = tile - tl.gather(tile_end - height, found, 0)
        row = tl.gather(start, found, 0) + at * BLOCK_M
        tl.store(tile_expert + tile, tl.where(inside, found, -1), mask=tile < tiles)
        tl.store(tile_row + tile, row, mask=(tile < tiles) & inside)
    if me == 0:
        tl.store(offsets + every, start, mask=every < E)
        tl.store(offsets + E, tl.sum(total, 0))

    base = start + earlier
    for chunk in range(each):
        first = (me * each + chunk) * CHUNK
        i = first + tl.arange(0, CHUNK)
        expert, local = _local(ids, i, P, E)
        j = first + tl.arange(0, CHUNK)
        other, _ = _local(ids, j, P, E)
        before = (other[:, None] == expert[None, :]) & (j[:, None] < i[None, :])
        rank = tl.sum(before.to(tl.int32), 0)
        row = tl.gather(base, tl.where(local, expert, 0), 0) + rank
        tl.store(pairs + row, i, mask=local)
        tl.store(positions + i, row, mask=local)
        base += tl.histogram(expert, PADDED, mask=local)
