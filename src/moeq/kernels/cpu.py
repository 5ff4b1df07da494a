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
    fp32, fp16     codes decoded to fp32.

Scales are applied in fp32 to the outputs, except those of blocks, which are folded into the
decoded tile. Left out: repacked copies of the weights (oneDNN's would be 1.5x faster at 16 rows,
but they are not what is saved), torch.compile, thread pools of our own.

Legend: T tokens, k experts per token, R rows, E experts, N x K one matrix; see `moeq.experts`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.experts import ExpertWeights
from moeq.kernels.activations import ACTIVATIONS
from moeq.quantize import SCALE_MIN
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme

# Rows of a run up to which the first way of the module docstring is the faster one.
# 2-core Zen 5 (AVX-512 VNNI), 64 cold experts of 1536x2048 and 2048x768, 1 and 2 threads.
_GEMV_ROWS_INT8 = 3
_GEMV_ROWS_FP8 = 4
_PACK_ROWS = 16

_CHUNK_ROWS = 1024
"""Rows of intermediate results held at a time: 6 MiB of h13 for I = 768."""

_TILE = 1 << 20
"""Codes decoded at a time: 2 MiB as bf16, which stays in a shared L3 or a large L2."""

_TILE_FP16 = 1 << 17
"""The same for fp16, whose decoding takes three passes: 256 KiB stays in L2."""


@dataclass(frozen=True)
class _Run:
    """Rows [start, stop) of a chunk that go to one expert."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Chunk:
    """Rows sorted by expert.

    Attributes:
        slots: int64 [R]: which (token, slot) pair, as an index into [T * k], each row is.
        experts: int64 [R].
        runs: cover the R rows.
    """

    slots: Tensor
    experts: Tensor
    runs: list[_Run]


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
        [T, H] in the dtype of x. A token's result does not depend on its place among the others.
    """
    scheme, k = weights.scheme, topk_ids.shape[1]
    act = ACTIVATIONS[activation]
    rows, row_scale = _prepare(x, scheme)
    factors = topk_weights.reshape(-1, 1).float()
    out = torch.zeros(x.shape, dtype=torch.float32)
    for chunk in _route(topk_ids, weights.num_experts):
        tokens = chunk.slots.div(k, rounding_mode="floor")
        h13 = _project(
            rows.index_select(0, tokens),
            None if row_scale is None else row_scale.index_select(0, tokens),
            chunk,
            weights.w13,
            weights.w13_scale,
            weights.b13,
            scheme,
            weights.parts,
        )
        if weights.is_gated:
            gate, up = h13.chunk(2, dim=-1)
            h = act(gate).mul_(up)
        else:
            h = act(h13)
        h_rows, h_scale = _prepare(h.to(x.dtype), scheme)
        y = _project(
            h_rows, h_scale, chunk, weights.w2, weights.w2_scale, weights.b2, scheme, parts=1
        )
        out.index_add_(0, tokens, y.mul_(factors.index_select(0, chunk.slots)))
    return out.to(x.dtype)


def expert_linear(
    x: Tensor,
    topk_ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    """One projection of the chosen experts: half a layer, for gates that only their model knows.

    Args:
        x: [T, j, K]; j is k, or 1 where the k experts of a token see the same row.
        topk_ids: [T, k] integer; ids outside 0..E-1 give rows of zeros.
        weight: codes [E, N, K].
        scale: fp32, `scale_shape(scheme.granularity, weight.shape, parts)`.
        bias: [E, N] or None.
        scheme: what the codes mean.
        parts: projections stacked along N.

    Returns:
        [T, k, N] in the dtype of x.
    """
    (t, k), j = topk_ids.shape, x.shape[1]
    rows, row_scale = _prepare(x.reshape(t * j, x.shape[2]), scheme)
    out = torch.zeros(t * k, weight.shape[1], dtype=x.dtype)
    for chunk in _route(topk_ids, weight.shape[0]):
        source = chunk.slots if j == k else chunk.slots.div(k, rounding_mode="floor")
        y = _project(
            rows.index_select(0, source),
            None if row_scale is None else row_scale.index_select(0, source),
            chunk,
            weight,
            scale,
            bias,
            scheme,
            parts,
        )
        out.index_copy_(0, chunk.slots, y.to(x.dtype))
    return out.view(t, k, -1)


def linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scheme: OnlineQuantScheme
) -> Tensor:
    """A quantized `nn.Linear`: x [..., K], codes [N, K], bias [N] or None -> [..., N]."""
    rows, row_scale = _prepare(x.reshape(-1, x.shape[-1]), scheme)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype)
    for start in range(0, rows.shape[0], _CHUNK_ROWS):
        piece = slice(start, min(start + _CHUNK_ROWS, rows.shape[0]))
        acc = _multiply(rows[piece], weight, scale, scheme, 1)
        y = acc.float() if acc.dtype != torch.float32 else acc
        if scheme.granularity is not Granularity.BLOCK:
            y.mul_(scale)
        if row_scale is not None:
            y.mul_(row_scale[piece])
        out[piece] = y if bias is None else y.add_(bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _route(topk_ids: Tensor, num_experts: int) -> Iterator[_Chunk]:
    """Sort the (token, slot) pairs by expert and yield them in chunks of `_CHUNK_ROWS`."""
    flat = topk_ids.reshape(-1)
    ordered, slots = flat.long().sort(stable=True)  # stable: rows of an expert in order of tokens
    edges = torch.searchsorted(ordered, torch.arange(num_experts + 1)).tolist()
    first, last = edges[0], edges[-1]  # what is outside belongs to other ranks
    runs: list[_Run] = []
    start = first
    for expert in range(num_experts):
        row = edges[expert]
        while row < edges[expert + 1]:
            stop = min(edges[expert + 1], start + _CHUNK_ROWS)
            runs.append(_Run(expert, row - start, stop - start))
            row = stop
            if row - start == _CHUNK_ROWS or row == last:
                yield _Chunk(slots[start:row], ordered[start:row], runs)
                start, runs = row, []


def _prepare(x: Tensor, scheme: OnlineQuantScheme) -> tuple[Tensor, Tensor | None]:
    """What rows x [R, K] look like to `_multiply`, and fp32 [R, 1] that its results lack."""
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
    exact = torch.int8 if _int_mm_is_exact() else _exact_float(x.dtype)
    return codes.to(exact), scale


def _exact_float(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _project(
    rows: Tensor,
    row_scale: Tensor | None,
    chunk: _Chunk,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scheme: OnlineQuantScheme,
    parts: int,
) -> Tensor:
    """Every run of a chunk times its expert: rows [R, K] of `_prepare` -> fp32 [R, N]."""
    dtype = torch.int32 if rows.dtype == torch.int8 else torch.float32
    acc = torch.empty(rows.shape[0], weight.shape[1], dtype=dtype)
    for run in chunk.runs:
        acc[run.start : run.stop] = _multiply(
            rows[run.start : run.stop], weight[run.expert], scale[run.expert], scheme, parts
        )
    y = acc.float() if dtype == torch.int32 else acc
    match scheme.granularity:
        case Granularity.TENSOR:
            y.mul_(scale.index_select(0, chunk.experts)[:, None])
        case Granularity.CHANNEL:
            y.mul_(scale.index_select(0, chunk.experts))
        case Granularity.BLOCK:
            pass
    if row_scale is not None:
        y.mul_(row_scale)
    if bias is not None:
        y.add_(bias.index_select(0, chunk.experts))
    return y


def _multiply(
    rows: Tensor, codes: Tensor, scale: Tensor, scheme: OnlineQuantScheme, parts: int
) -> Tensor:
    """rows [m, K] @ codes [N, K].T -> [m, N], before scales other than those of blocks."""
    m, (n, k) = rows.shape[0], codes.shape
    if rows.dtype == torch.int8:
        if m <= _GEMV_ROWS_INT8:
            return torch.cat([torch._int_mm(row[None], codes.t()) for row in rows])
        return torch._int_mm(rows, codes.t())
    if codes.dtype == torch.int8:
        if m <= _PACK_ROWS and _int8pack_takes(rows, codes):
            ones = torch.ones(n, dtype=torch.bfloat16)
            return torch._weight_int8pack_mm(rows, codes, ones)
        step = _rows_per_tile(_TILE, k)
        pieces = [rows @ codes[i : i + step].to(rows.dtype).t() for i in range(0, n, step)]
        return torch.cat(pieces, dim=1)

    few = m <= _GEMV_ROWS_FP8
    if few and rows.dtype != torch.float32 and scheme.granularity is not Granularity.BLOCK:
        step = _rows_per_tile(_TILE_FP16, k)
        rows = rows.half()
        out = torch.empty(m, n, dtype=torch.float16)
        for i in range(0, n, step):
            tile = _decode_fp8(codes[i : i + step])
            for row, y in zip(rows, out, strict=True):
                torch.mv(tile, row, out=y[i : i + step])
        return out
    step = _rows_per_tile(_TILE_FP16 if few else _TILE, k)
    math = torch.float32 if few or rows.dtype == torch.float16 else rows.dtype
    rows = rows.to(math)
    by_row = _scale_by_row(scale, n, parts) if scheme.granularity is Granularity.BLOCK else None
    pieces = []
    for i in range(0, n, step):
        tile = _decode_fp8(codes[i : i + step]).float()
        if by_row is not None:
            _apply_block_scale(tile, by_row[i : i + step])
        pieces.append(rows @ tile.to(math).t())
    return torch.cat(pieces, dim=1)


def _int8pack_takes(rows: Tensor, codes: Tensor) -> bool:
    """Whether `_weight_int8pack_mm` is fast and right for these. It checks neither that 16 divides
    K nor that its vector loads are aligned: it reads past the end of rows, or crashes. Weights in
    a memory-mapped file may have any address. Rows of fp16 and fp32 it takes one by one."""
    return (
        rows.dtype == torch.bfloat16
        and codes.shape[1] % 16 == 0
        and rows.data_ptr() % 32 == 0
        and codes.data_ptr() % 16 == 0
        and rows.is_contiguous()
        and codes.is_contiguous()
    )


def _rows_per_tile(codes: int, k: int) -> int:
    """Rows of K codes that make a tile: `codes` for every thread."""
    return max(1, codes * torch.get_num_threads() // k)


def _decode_fp8(codes: Tensor) -> Tensor:
    """e4m3 codes [n, K] -> their values * 2^-8 as fp16, exactly, subnormals included.

    e4m3 is s eeee mmm and fp16 is s eeeee mmmmmmmmmm, so the bits only move: sign-extend to 16
    bits, shift left by 7, and clear the second copy of the sign. The bias of the exponents differs
    by 8. (`.to(torch.float16)` takes 40 times as long in PyTorch 2.13.) NaN codes become 480; a
    NaN among the weights still shows, through its scale.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    return wide.mul_(128).bitwise_and_(~0x4000).view(torch.float16)


def _scale_by_row(scale: Tensor, n: int, parts: int) -> Tensor:
    """Block scales [parts * ceil(n / parts / 128), B] -> [n, B], one line for every row."""
    grids = scale.view(parts, -1, scale.shape[1]).repeat_interleave(BLOCK, dim=1)
    return grids[:, : n // parts].reshape(n, -1)


def _apply_block_scale(tile: Tensor, by_row: Tensor) -> None:
    """Multiply tile fp32 [n, K] by scales [n, ceil(K / 128)], in place."""
    whole = tile.shape[1] // BLOCK
    tile[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).mul_(by_row[:, :whole, None])
    tile[:, whole * BLOCK :].mul_(by_row[:, -1:])


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether int8 products are exact here. Without VNNI oneDNN adds pairs of them in int16, which
    saturates: silently, and only where values are large, so that is what is tried."""
    peak = torch.full((16, 64), 127, dtype=torch.int8)
    products = torch.cat([torch._int_mm(peak[:m], peak.t()) for m in (1, 16)])
    return bool((products == 127 * 127 * 64).all())
