"""Experts and linears on CPUs, out of operators that ship inside PyTorch: no compiler needed.

    h13 = x @ w13.T * scale + b13;  h = act(gate) * up;  y = h @ w2.T * scale + b2
    out = sum over a token's experts of topk_weight * y, in fp32

Rows (token, slot) are sorted by expert, so that each expert meets its rows in one *run*; a run is
one matrix product, everything elementwise happens on many runs at once. What a run multiplies with
depends on the dtype of codes and rows, and on how many rows share the cost of preparing codes
(benchmarks/LOG.md has the measurements and the losers):

    int8 x int8    exact int32. One row at a time while rows are few: oneDNN's GEMV reads codes at
                   memory speed, its GEMM repacks them first.
    bf16 x int8    `_weight_int8pack_mm` reads codes as they are; past a few rows it is cheaper to
                   decode a tile of codes to bf16 (exact) that stays in cache, and GEMM.
    fp8            CPUs have no fp8 units, so activations stay unquantized: more exact than the
                   scheme asks. Few rows meet codes decoded to fp16, where PyTorch's GEMV is
                   fast; more rows meet bf16 or fp32.
    four bits      a tile of codes times their group scales, exact in bf16, then GEMM; int4 codes
                   arranged for it, `_weight_int4pack_mm_for_cpu` (`moeq.kernels.cpu_int4`).
    fp32, fp16     codes decoded to fp32.

Scales are applied in fp32 to the outputs, except those of blocks, which are folded into the
decoded tile. Left out: repacked copies of the weights (oneDNN's would be 1.4x faster at 16 rows,
but they are not what is saved, nor as small), torch.compile, thread pools of our own.

Legend: T tokens, k experts per token, R rows, E experts, N x K one matrix; see `moeq.experts`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.four_bits import decode
from moeq.kernels.activations import ACTIVATIONS
from moeq.kernels.cpu_int4 import is_arranged, runs_of_arranged
from moeq.quantize import SCALE_MIN
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme

# Rows of a run up to which the first way of the module docstring is the faster one.
# 2-core Zen 5 (AVX-512 VNNI), 64 cold experts of 1536x2048 and 2048x768, 1 and 2 threads.
_GEMV_ROWS_INT8 = 3
_GEMV_ROWS_FP8 = 2
_PACK_ROWS = 16

_CHUNK_ROWS = 256
"""Rows of intermediate results held at a time: 1.5 MiB of h13 for I = 768, which stays in cache."""

_RUN_ROWS = 1024
"""Longer runs are cut, so that memory stays bounded."""

_FEW_PAIRS = 64
"""Pairs of (token, expert) up to which Python's sort beats the overhead of six operators."""

_TILE = 1 << 20
"""Codes decoded at a time: 2 MiB as bf16, which stays in a shared L3 or a large L2."""


class _Run(NamedTuple):
    """Rows [start, stop) of a chunk that go to one expert."""

    expert: int
    start: int
    stop: int


class _Chunk(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        slots: int64 [R]: which (token, slot) pair, as an index into [T * k], each row is.
        experts: int64 [R].
        runs: cover the R rows.
    """

    slots: Tensor
    experts: Tensor
    runs: list[_Run]


class _Matrices(NamedTuple):
    """One projection of every expert: codes of [E, N, K], scales, bias [E, N] or None;
    `ExpertWeights` has the details. A linear is a projection with E = 1."""

    scheme: OnlineQuantScheme
    codes: Tensor
    scale: Tensor
    group: Tensor | None
    bias: Tensor | None
    parts: int


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activation: str,
) -> Tensor:
    """One MoE layer after its router.

    Args:
        x: [T, H], fp16, bf16 or fp32.
        topk_ids: [T, k] integer. An id < 0 or >= E belongs to another rank and adds nothing.
        topk_weights: [T, k], floating.
        weights: of the E experts held here.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, H] in the dtype of x, the same bits from run to run.
    """
    scheme, (t, k) = weights.scheme, topk_ids.shape
    w13 = _Matrices(
        scheme, weights.w13, weights.w13_scale, weights.w13_group, weights.b13, weights.parts
    )
    w2 = _Matrices(scheme, weights.w2, weights.w2_scale, weights.w2_group, weights.b2, 1)

    def layer(rows: Tensor, row_scale: Tensor | None, experts: Tensor, runs: list[_Run]) -> Tensor:
        h = _gate(_project(rows, row_scale, experts, runs, w13), weights.parts, activation)
        return _project(*_prepare(h.to(x.dtype), scheme), experts, runs, w2)

    rows, row_scale = _prepare(x, scheme)
    if t == 1:  # decoding: caches are cold, and every operator less counts
        ids = topk_ids[0].tolist()
        if all(0 <= expert < weights.num_experts for expert in ids):
            runs = [_Run(expert, slot, slot + 1) for slot, expert in enumerate(ids)]
            y = layer(rows.repeat(k, 1), row_scale, topk_ids[0].long(), runs)
            return (topk_weights.float() @ y).to(x.dtype)
    factors = topk_weights.reshape(-1, 1).float()
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for slots, experts, runs in _route(topk_ids, weights.num_experts):
        tokens = slots // k
        y = layer(_take(rows, tokens), _take(row_scale, tokens), experts, runs)
        out.index_add_(0, tokens, y.mul_(_take(factors, slots)))
    return out.to(x.dtype)


def expert_linear(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    """One projection of the chosen experts: half a layer, for gates that only their model knows.

    Args:
        x: [T, j, K]; j is k, or 1 where the k experts of a token see the same row.
        topk_ids: [T, k] integer; ids outside 0..E-1 give rows of zeros.
        weight: codes [E, N, code_columns(K)].
        scale: fp32, `scale_shape(scheme.granularity, [E, N, K], parts)`.
        group: `scheme.group_dtype`, `group_shape(scheme, [E, N, K])`, or None.
        bias: [E, N] or None.
        scheme: what the codes mean.
        parts: projections stacked along N.

    Returns:
        [T, k, N] in the dtype of x.
    """
    (t, k), j = topk_ids.shape, x.shape[1]
    matrices = _Matrices(scheme, weight, scale, group, bias, parts)
    rows, row_scale = _prepare(x.reshape(t * j, x.shape[2]), scheme)
    out = x.new_zeros(t * k, weight.shape[1])
    for slots, experts, runs in _route(topk_ids, weight.shape[0]):
        source = slots if j == k else slots // k
        y = _project(_take(rows, source), _take(row_scale, source), experts, runs, matrices)
        out.index_copy_(0, slots, y.to(x.dtype))
    return out.view(t, k, weight.shape[1])


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: Tensor | None,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
) -> Tensor:
    """A quantized `nn.Linear`: x [..., K], codes of [N, K], bias [N] or None -> [..., N]."""
    groups, biases = (None if t is None else t[None] for t in (group, bias))
    matrices = _Matrices(scheme, weight[None], scale[None], groups, biases, 1)
    pieces = []
    for piece in torch.split(x.reshape(-1, x.shape[-1]), _RUN_ROWS):
        rows, row_scale = _prepare(piece, scheme)
        runs = [_Run(0, 0, len(rows))] if len(rows) else []
        pieces.append(_project(rows, row_scale, None, runs, matrices).to(x.dtype))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out.view(*x.shape[:-1], weight.shape[0])


def _gate(h: Tensor, parts: int, activation: str) -> Tensor:
    """h13 [R, P * I] -> h [R, I]."""
    act = ACTIVATIONS[activation]
    if parts == 1:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate).mul_(up)


def _take(t: Tensor | None, index: Tensor | None) -> Any:
    """Rows of a tensor that may not be there; without an index, its one row as it is."""
    return t if t is None or index is None else t.index_select(0, index)


def _route(topk_ids: Tensor, num_experts: int) -> Iterator[_Chunk]:
    """Sort the (token, slot) pairs by expert and yield them in chunks."""
    experts, slots, counts = _sort_pairs(topk_ids.reshape(-1), num_experts)
    runs: list[_Run] = []
    first = last = 0
    for expert, count in counts:
        for start in range(0, count, _RUN_ROWS):
            rows = min(_RUN_ROWS, count - start)
            if runs and last + rows - first > _CHUNK_ROWS:
                yield _Chunk(slots[first:last], experts[first:last], runs)
                first, runs = last, []
            runs.append(_Run(expert, last - first, last - first + rows))
            last += rows
    if runs:
        yield _Chunk(slots[first:last], experts[first:last], runs)


def _sort_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Experts and indices of the pairs that are ours, sorted by expert, then by index; and how many
    pairs each expert has."""
    if ids.numel() <= _FEW_PAIRS:
        pairs = sorted((e, slot) for slot, e in enumerate(ids.tolist()) if 0 <= e < num_experts)
        experts, slots = ids.new_tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        return experts, slots, list(Counter(expert for expert, _ in pairs).items())
    ids = ids.long()
    slots = torch.nonzero((ids >= 0) & (ids < num_experts)).squeeze(1)
    experts, order = ids[slots].sort(stable=True)
    present, counts = torch.unique_consecutive(experts, return_counts=True)
    return experts, slots[order], list(zip(present.tolist(), counts.tolist(), strict=True))


def _prepare(x: Tensor, scheme: OnlineQuantScheme) -> tuple[Tensor, Tensor | None]:
    """What rows x [R, K] look like to `_project`, and the fp32 [R, 1] that it multiplies by."""
    if scheme.weight_dtype == torch.float8_e4m3fn:
        magnitude = x.abs().amax(-1, keepdim=True).float().clamp_(min=SCALE_MIN)
        # The power of two below amax: dividing by it is exact, and puts x into the range of fp16.
        power = magnitude.view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
        return (x.float() / power.mul_(8)).to(x.dtype), power * 256
    if not scheme.quantizes_activations:
        return (x if x.dtype == torch.bfloat16 else x.float()), None
    # quantize.quantize_activations, the same bits in fewer passes: codes of an all-zero row are 0
    # under any scale, and x / scale never rounds past 127.
    scale = x.abs().amax(-1, keepdim=True).float().div_(127.0).clamp_(min=SCALE_MIN)
    codes = (x.float() / scale).round_()
    if x.shape[1] > 1 and _int_mm_is_exact():  # for one column it writes nothing at all
        return codes.to(torch.int8), scale
    return (codes.bfloat16() if x.dtype == torch.bfloat16 else codes), scale  # exact in both


def _project(
    rows: Tensor,
    row_scale: Tensor | None,
    experts: Tensor | None,
    runs: list[_Run],
    matrices: _Matrices,
) -> Tensor:
    """Every run times the matrix of its expert, scaled and with bias.

    Args:
        rows: [R, K], as `_prepare` returns them, contiguous.
        row_scale: fp32 [R, 1] or [1, 1], likewise.
        experts: int64 [R], the expert of every row; None where there is one.
        runs: cover the R rows.
        matrices: of every expert.

    Returns:
        fp32 [R, N].
    """
    scheme, codes, scale, group, bias, _ = matrices
    if rows.dtype == torch.int8:
        y = _int8_runs(rows, runs, codes).float()
    elif codes.dtype == torch.int8:
        y = _weight_only_runs(rows, runs, codes).float()
    elif group is not None and is_arranged(codes):
        y = runs_of_arranged(rows, runs, codes, group).float()
    elif group is not None:
        y = _four_bit_runs(rows, runs, codes, group).float()
    else:
        y = _fp8_runs(rows, runs, matrices)
    match scheme.granularity:
        case Granularity.TENSOR:
            y.mul_(_take(scale[:, None], experts))
        case Granularity.CHANNEL:
            y.mul_(_take(scale, experts))
        case Granularity.BLOCK:
            pass  # is in y
    if row_scale is not None:
        y.mul_(row_scale)
    if bias is not None:
        y.add_(_take(bias, experts))
    return y


def _int8_runs(rows: Tensor, runs: list[_Run], codes: Tensor) -> Tensor:
    """int8 rows [R, K], codes [E, N, K] -> int32 [R, N]. `_int_mm` needs contiguous rows: of rows
    that `expand` made it returns garbage."""
    acc = rows.new_empty(len(rows), codes.shape[1], dtype=torch.int32)
    columns = codes.transpose(1, 2)
    for expert, start, stop in runs:
        matrix = columns[expert]
        step = 1 if stop - start <= _GEMV_ROWS_INT8 else stop - start
        for i in range(start, stop, step):
            torch._int_mm(rows[i : i + step], matrix, out=acc[i : i + step])
    return acc


def _weight_only_runs(rows: Tensor, runs: list[_Run], codes: Tensor) -> Tensor:
    """bf16 or fp32 rows [R, K], int8 codes [E, N, K] -> [R, N] in the dtype of the rows."""
    most = _PACK_ROWS if _int8pack_takes(rows, codes) else 0
    ones = rows.new_ones(codes.shape[1])
    room: Tensor | None = None
    pieces = [rows.new_empty(0, len(ones))]
    for expert, start, stop in runs:
        some, matrix = rows[start:stop], codes[expert]
        if stop - start <= most:
            pieces.append(torch._weight_int8pack_mm(some, matrix, ones))
            continue
        room = _tile(codes, rows.dtype) if room is None else room
        products = [
            some @ room[: len(tile)].copy_(tile).t() for tile in torch.split(matrix, len(room))
        ]
        pieces.append(torch.cat(products, dim=1))
    return torch.cat(pieces)


def _four_bit_runs(rows: Tensor, runs: list[_Run], codes: Tensor, group: Tensor) -> Tensor:
    """bf16 or fp32 rows [R, K], codes [E, N, packed(K)], group scales [E, N, groups(K)] -> [R, N]
    in the dtype of the rows."""
    n, k = codes.shape[1], rows.shape[1]
    out = rows.new_empty(len(rows), n)
    height = max(1, _TILE // max(k, 1))
    for expert, start, stop in runs:
        for i in range(0, n, height):
            part = slice(i, i + height)
            tile = decode(codes[expert, part], group[expert, part], torch.bfloat16)
            out[start:stop, part] = rows[start:stop] @ tile[:, :k].to(rows.dtype).t()
    return out


def _fp8_runs(rows: Tensor, runs: list[_Run], matrices: _Matrices) -> Tensor:
    """rows [R, K], fp8 codes [E, N, K] -> fp32 [R, N], with the scales of blocks in it."""
    scheme, codes, scale, _, _, parts = matrices
    n = codes.shape[1]
    blocks = scheme.granularity is Granularity.BLOCK
    half, single, brain = (_tile(codes, d) for d in (torch.float16, torch.float32, torch.bfloat16))
    out = rows.new_empty(len(rows), n, dtype=torch.float32)
    for expert, start, stop in runs:
        some, matrix = rows[start:stop], codes[expert]
        few = stop - start <= _GEMV_ROWS_FP8
        by_row = _scale_by_row(scale[expert], n, parts) if blocks else None
        if few and not blocks and rows.dtype != torch.float32:
            math = torch.float16
        elif rows.dtype == torch.bfloat16 and not few:
            math = torch.bfloat16
        else:
            math = torch.float32
        some = some.to(math)
        for i in range(0, n, len(half)):
            tile = matrix[i : i + len(half)]
            decoded = _decode_fp8(tile, half)
            here = out[start:stop, i : i + len(tile)]
            if math == torch.float16:
                for row, y in zip(some, here, strict=True):
                    y.copy_(torch.mv(decoded, row))
                continue
            decoded = single[: len(tile)].copy_(decoded)
            if by_row is not None:
                _apply_block_scale(decoded, by_row[i : i + len(tile)])
            if math == torch.bfloat16:
                decoded = brain[: len(tile)].copy_(decoded)
            here.copy_(some @ decoded.t())
    return out


def _tile(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a tile of some rows of codes [E, N, K], decoded. Made once per projection: fresh
    memory for every tile would cost more in page faults than the decoding does."""
    _, n, k = codes.shape
    return codes.new_empty(min(n, max(1, _TILE // k)), k, dtype=dtype)


def _int8pack_takes(rows: Tensor, codes: Tensor) -> bool:
    """Whether `_weight_int8pack_mm` is fast and right for any rows [R, K] and matrix of these. It
    checks neither that 16 divides K nor that its vector loads are aligned: it reads past the end of
    rows, or crashes. Weights in a memory-mapped file may have any address. fp16 and fp32 it takes
    element by element."""
    return (
        rows.dtype == torch.bfloat16
        and codes.shape[2] % 16 == 0
        and rows.data_ptr() % 32 == 0
        and codes.data_ptr() % 16 == 0
        and rows.is_contiguous()
        and codes.is_contiguous()
    )


def _decode_fp8(codes: Tensor, out: Tensor) -> Tensor:
    """e4m3 codes [n, K] -> their values * 2^-8 as fp16 in `out`, exactly, subnormals included.

    e4m3 is s eeee mmm and fp16 is s eeeee mmmmmmmmmm, so the bits only move: sign-extend to 16
    bits, shift left by 7, and clear the second copy of the sign. The bias of the exponents differs
    by 8. (`.to(torch.float16)` takes 40 times as long in PyTorch 2.13.) NaN codes become 480; a
    NaN among the weights still shows, through its scale.
    """
    wide = out[: len(codes)].view(torch.int16).copy_(codes.view(torch.int8))
    return wide.mul_(128).bitwise_and_(~0x4000).view(torch.float16)


def _scale_by_row(scale: Tensor, n: int, parts: int) -> Tensor:
    """Block scales [parts * ceil(n / parts / 128), B] -> [n, B], one line for every row."""
    grids = scale.view(parts, -1, scale.shape[1]).repeat_interleave(BLOCK, dim=1)
    return grids[:, : n // parts].reshape(n, -1)


def _apply_block_scale(tile: Tensor, by_row: Tensor) -> None:
    """Multiply tile fp32 [n, K] by scales [n, ceil(K / 128)], in place."""
    whole = tile.shape[1] // BLOCK
    tile[:, : whole * BLOCK].view(len(tile), whole, BLOCK).mul_(by_row[:, :whole, None])
    tile[:, whole * BLOCK :].mul_(by_row[:, -1:])


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether int8 products are exact here. Without VNNI oneDNN adds pairs of them in int16, which
    saturates: silently, and only where values are large, so that is what is tried."""
    peak = torch.full((16, 64), 127, dtype=torch.int8)
    products = torch.cat([torch._int_mm(peak[:m], peak.t()) for m in (1, 16)])
    return bool((products == 127 * 127 * 64).all())
