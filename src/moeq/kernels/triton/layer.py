"""A MoE layer as a chain of launches, along one of three paths.

    gemv      up, down                                   a few tokens (`gemv.py`)
    gemm      route, up, down, combine                   everything between (`gemm.py`)
    library   route, gather, then for parts of the       weight-only codes that very many rows share
              weights: decode, torch's grouped GEMM,     (`library.py`)
              activate or combine

Schemes that quantize activations put `quantize_rows` in front of each product. Nothing depends on
data on the host: grids are bounds, memory is sized by T and k, so that a chain can be captured into
a CUDA graph. Consecutive kernels overlap by programmatic dependent launch (PDL): each may start
while its predecessor drains, and waits before it reads what that wrote.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moeq import four_bits
from moeq.experts import ExpertWeights, blocks
from moeq.kernels.triton import gemm, gemv, library, rows
from moeq.kernels.triton.routing import Routing, route
from moeq.schemes import Granularity, OnlineQuantScheme

_SCALES = {Granularity.TENSOR: "tensor", Granularity.CHANNEL: "channel", Granularity.BLOCK: "block"}

_EXACT_PAIRS = 1024
"""Pairs up to which outputs of experts wait for their sum in fp32; more of them cost bandwidth, and
wait in bf16. fp16 has no room for outputs that their weights have not made small yet."""

_ALIGNMENT = 16
"""Bytes, of the rows of a matrix behind a tensor descriptor and of its first."""


@dataclass(frozen=True)
class Gemm:
    """How `gemm.grouped_gemm` is cut and launched."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 1
    swap: bool = False
    promote: bool = False
    registers: int | None = None
    tail_m: int = 0
    halves: bool = False
    """See `gemm._block_tile`; for codes of blocks."""


@dataclass(frozen=True)
class Gemv:
    """How a kernel of `gemv` is cut and launched."""

    rows: int
    block_k: int
    warps: int


@dataclass(frozen=True)
class GemvPath:
    up: Gemv
    down: Gemv


@dataclass(frozen=True)
class GemmPath:
    block_m: int
    up: Gemm
    down: Gemm


@dataclass(frozen=True)
class LibraryPath:
    """torch's grouped GEMM; `scratch`: bytes of decoded weights held at a time."""

    scratch: int


Path = GemvPath | GemmPath | LibraryPath


class Projection(NamedTuple):
    """One product's weights: codes of [E, parts * N, K], scales, bias, as in `ExpertWeights`."""

    scheme: OnlineQuantScheme
    codes: Tensor
    scale: Tensor
    group: Tensor | None
    bias: Tensor | None
    parts: int
    k: int

    @property
    def n(self) -> int:
        return self.codes.shape[1] // self.parts


def projections(weights: ExpertWeights) -> tuple[Projection, Projection]:
    """(w13, w2) of a layer."""
    w13 = Projection(
        weights.scheme, weights.w13, weights.w13_scale, weights.w13_group, weights.b13,
        weights.parts, weights.hidden_size,
    )  # fmt: skip
    w2 = Projection(
        weights.scheme, weights.w2, weights.w2_scale, weights.w2_group, weights.b2,
        1, weights.intermediate_size,
    )  # fmt: skip
    return w13, w2


@dataclass(frozen=True)
class Arithmetic:
    """What products are made of on a device.

    Attributes:
        codes: multiply codes by quantized activations; else decode codes to the rows' dtype.
        fp8_bits: codes are e4m3, which the GPU does not know: they are taken apart by hand.
        pdl: kernels may overlap.
        ptx: kernels may hold PTX, which Triton's interpreter does not know.
    """

    codes: bool
    fp8_bits: bool
    pdl: bool
    ptx: bool


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    activation: str,
    path: Path,
    arithmetic: Arithmetic,
) -> Tensor:
    """x [T, H], T * k > 0 -> [T, H]. See `moeq.kernels.reference.fused_experts`."""
    w13, w2 = projections(weights)
    (t, h), k = x.shape, topk_ids.shape[1]
    if isinstance(path, LibraryPath):
        return library.fused_experts(x, topk_ids, topk_weights, weights, activation, path.scratch)
    out = torch.empty_like(x)
    if isinstance(path, GemvPath):
        a, a_scale = quantized(x, w13, arithmetic, pdl=False)
        mid = x.new_empty(t * k, w2.k)
        gemv_up(a, a_scale, topk_ids, w13, mid, activation, path.up, arithmetic, pdl=a is not x)
        a, a_scale = quantized(mid, w2, arithmetic)
        gemv_down(a, a_scale, topk_ids, topk_weights, w2, out, path.down, arithmetic)
        return out
    routing = route(topk_ids, weights.num_experts, path.block_m, pdl=arithmetic.pdl)
    a, a_scale = quantized(x, w13, arithmetic, pdl=False)
    mid = x.new_empty(t * k, w2.k)
    run_gemm(
        a, a_scale, routing, w13, mid, activation, k, path.block_m, path.up, arithmetic,
        x_rows="token", out_rows="sorted",
    )  # fmt: skip
    a, a_scale = quantized(mid, w2, arithmetic)
    exact = t * k <= _EXACT_PAIRS or x.dtype == torch.float16
    y = x.new_empty(t * k, h, dtype=torch.float32 if exact else x.dtype)
    run_gemm(
        a, a_scale, routing, w2, y, "", k, path.block_m, path.down, arithmetic,
        x_rows="sorted", out_rows="pair",
    )  # fmt: skip
    rows.combine_rows(
        y, topk_ids, topk_weights, out, weights.num_experts, pdl=arithmetic.pdl
    )  # fmt: skip
    return out


def run_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    routing: Routing | None,
    w: Projection,
    out: Tensor,
    activation: str,
    top_k: int,
    block_m: int,
    config: Gemm,
    arithmetic: Arithmetic,
    *,
    x_rows: str,
    out_rows: str,
) -> None:
    """One `gemm.grouped_gemm`; `out` is written where there are rows. Without a routing all rows
    belong to the one expert there is."""
    codes, w_scale, group, bias = _operands(w, arithmetic)
    if config.halves and (w.k % _ALIGNMENT or codes.data_ptr() % _ALIGNMENT):
        config = replace(config, halves=False, block_n=128)  # no tensor descriptor for these
    cols = config.block_n // w.parts
    if config.halves:
        lines = [codes.shape[0] * codes.shape[1], w.k]
        box = [config.block_n // 2, config.block_k]
        codes = TensorDescriptor(codes, lines, [w.k, 1], box)
    tiles = triton.cdiv(x.shape[0], block_m) if routing is None else routing.tiles
    grid = (tiles * triton.cdiv(w.n, cols),)
    tables = (x,) * 4 if routing is None else (
        routing.pairs, routing.offsets, routing.tile_expert, routing.tile_row,
    )  # fmt: skip
    gemm.grouped_gemm[grid](
        x,
        x if x_scale is None else x_scale,
        codes,
        w_scale,
        group,
        bias,
        out,
        *tables,
        x.shape[0],
        w.n,
        w.k,
        top_k,
        DENSE=routing is None,
        X_ROWS=x_rows,
        OUT_ROWS=out_rows,
        PARTS=w.parts,
        ACT=activation,
        **_constants(w, x_scale, arithmetic),
        COUNT_BY=math.gcd(four_bits.groups(w.k), 16),
        EVEN_K=w.k % config.block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SWAP=config.swap,
        PROMOTE=config.promote,
        TAIL_M=config.tail_m,
        HALVES=config.halves,
        STAGES=config.stages,
        PDL=arithmetic.pdl,
        num_warps=config.warps,
        **({"maxnreg": config.registers} if config.registers else {}),
        **rows.launch_options(arithmetic.pdl),
    )


def gemv_up(
    x: Tensor,
    x_scale: Tensor | None,
    topk_ids: Tensor | None,
    w: Projection,
    out: Tensor,
    activation: str,
    config: Gemv,
    arithmetic: Arithmetic,
    *,
    pdl: bool,
) -> None:
    """One `gemv.up`: x [T or P, K] -> out [P, N], or [P, parts * N] without an activation. Without
    ids all rows belong to the one expert there is."""
    pairs = out.shape[0]
    pdl = pdl and arithmetic.pdl
    gemv.up[(triton.cdiv(w.n, config.rows), pairs)](
        x,
        x if x_scale is None else x_scale,
        x if topk_ids is None else topk_ids,
        *_operands(w, arithmetic),
        out,
        w.codes.shape[0],
        w.n,
        w.k,
        1 if topk_ids is None else topk_ids.shape[1],
        DENSE=topk_ids is None,
        X_PER_PAIR=x.shape[0] == pairs,
        PARTS=w.parts,
        ACT=activation,
        **_constants(w, x_scale, arithmetic),
        ROWS=config.rows,
        BLOCK_K=config.block_k,
        TRIGGER=arithmetic.pdl,
        WAIT=pdl,
        num_warps=config.warps,
        **rows.launch_options(pdl),
    )


def gemv_down(
    h: Tensor,
    h_scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w: Projection,
    out: Tensor,
    config: Gemv,
    arithmetic: Arithmetic,
) -> None:
    """One `gemv.down`: h [P, K] -> out [T, N]."""
    t, k = topk_ids.shape
    gemv.down[(triton.cdiv(w.n, config.rows), t)](
        h,
        h if h_scale is None else h_scale,
        topk_ids,
        topk_weights,
        *_operands(w, arithmetic),
        out,
        w.codes.shape[0],
        w.n,
        w.k,
        k,
        SLOTS=triton.next_power_of_2(k),
        **_constants(w, h_scale, arithmetic),
        ROWS=config.rows,
        BLOCK_K=config.block_k,
        PDL=arithmetic.pdl,
        num_warps=config.warps,
        **rows.launch_options(arithmetic.pdl),
    )


def quantize_rows(
    x: Tensor, scheme: OnlineQuantScheme, *, trigger: bool = False, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """`moeq.quantize.quantize_activations`, bit for bit; x [R, K] contiguous. The next kernel may
    overlap with it (`trigger`), and it with the previous one (`pdl`)."""
    r, k = x.shape
    by_block = scheme.granularity is Granularity.BLOCK
    codes = torch.empty_like(x, dtype=scheme.weight_dtype)
    scale = torch.empty(r, blocks(k) if by_block else 1, dtype=torch.float32, device=x.device)
    wide = max(128, triton.next_power_of_2(k))
    height = 1 if r <= 1024 else max(1, min(8, 4096 // wide))
    rows.quantize_rows[(triton.cdiv(r, height),)](
        x, codes, scale, r, k, BLOCKS=by_block, HEIGHT=height, WIDE=wide,
        TRIGGER=trigger, WAIT=pdl,
        num_warps=max(4, min(16, wide * height // 1024)), **rows.launch_options(pdl),
    )  # fmt: skip
    return codes, scale


def quantized(
    x: Tensor, w: Projection, arithmetic: Arithmetic, *, pdl: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Rows as the product takes them, and their scales where they are quantized."""
    if not (arithmetic.codes and w.scheme.quantizes_activations):
        return x, None
    return quantize_rows(x, w.scheme, trigger=arithmetic.pdl, pdl=pdl and arithmetic.pdl)


def _operands(w: Projection, arithmetic: Arithmetic) -> tuple[Tensor, ...]:
    """Codes (of four bits: words of eight), scale, group scales and bias as kernels take them; what
    is absent is some tensor, never read."""
    for tensor in (w.codes, w.scale, w.group, w.bias):
        assert tensor is None or tensor.is_contiguous(), tensor.stride()
    codes, group = w.codes, w.scale
    if w.group is not None:
        codes, group = codes.view(torch.int32), w.group.view(torch.uint8)
    elif arithmetic.fp8_bits:
        codes = codes.view(torch.int8)
    return codes, w.scale, group, w.scale if w.bias is None else w.bias


def _constants(w: Projection, row_scale: Tensor | None, arithmetic: Arithmetic) -> dict[str, Any]:
    """What every product has to know of its weights, and of whether its rows are quantized."""
    return {
        "SCALES": _SCALES[w.scheme.granularity],
        "MATH": "decode" if row_scale is None else "codes",
        "FP8_BITS": arithmetic.fp8_bits,
        "GROUPS": "" if w.group is None else rows.GROUPS[w.group.dtype],
        "PTX": arithmetic.ptx,
        "HAS_BIAS": w.bias is not None,
    }
