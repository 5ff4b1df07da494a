"""The numerics: what every kernel, engine and saved checkpoint of moeq agrees on, bit for bit.

    scale = max(amax / qmax, 2^-126)     1 where amax is 0
    code  = clamp(round_half_even(w / scale), -qmax, qmax)      int8, qmax 127
    code  = e4m3fn(clamp(w / scale, -qmax, qmax))               fp8,  qmax 448
    w'    = code * scale                                        four bits: see `moeq.four_bits`

Amax, scale and quotient are fp32 whatever the dtype of the checkpoint: in bf16 the quotient alone
adds 11 % to the squared error of int8. A row of zeros gets scale 1 and codes that are exactly zero,
never 0 / 0. The floor of 2^-126 keeps the quotient finite for rows of subnormals.

`amax` and `quantize` are separate because ranks that hold parts of one row reduce the amax between
them. Both are elementwise or reduce with max, so the bytes do not depend on device, chunking, the
order in which tensors arrive, or how they are split.

Weights are matrices [..., N, K] (N output rows, K input columns); functions take any number of
leading dimensions. Left out: zero points, stochastic rounding, clipping searches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeq import four_bits
from moeq.errors import NonFiniteError
from moeq.experts import blocks, scale_shape
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: four_bits.QMAX}
"""Largest code. int8 is symmetric: -128 is never used."""

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be quantized."""

SCALE_MIN = torch.finfo(torch.float32).tiny
"""2^-126, the smallest normal fp32: below it a quotient loses bits or overflows."""

LARGEST = torch.finfo(torch.bfloat16).max / 2
"""1.69e38. Of what is above, a code times its scale can be Inf, in bf16 or already in fp32: four
bits make of 2^127 or more a -8 under scales of 2^117 and 256. No such weight was ever trained."""

_CHUNK = {"cpu": 1 << 18}
"""Elements worked on at a time, by device type, in whole rows or rows of blocks: on a CPU, what a
core's second cache holds in fp32; with less, threads wait for Python's lock between operators."""

_CHUNK_ELSEWHERE = 1 << 24


def amax(weight: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of each group of `weight` that shares a scale.

    Args:
        weight: [..., N, K], any floating dtype.
        granularity: what shares a scale.

    Returns:
        fp32 of shape `scale_shape(granularity, weight.shape)`. A group with a NaN gives NaN.
    """
    if weight.numel() == 0:
        shape = scale_shape(granularity, tuple(weight.shape))
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)
    if weight.ndim > 2:
        return torch.stack([amax(w, granularity) for w in weight])
    pieces = []
    for rows in _row_chunks(weight, granularity):
        magnitude = _magnitude(weight[rows])
        if granularity is Granularity.BLOCK:
            pieces.append(_block_max(_block_max(magnitude, dim=-1), dim=-2))
        else:
            pieces.append(magnitude.amax(-1))
    whole = torch.cat(pieces).view(weight.dtype).float()
    return whole.amax(-1) if granularity is Granularity.TENSOR else whole


def scale_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scales for codes of `dtype` from the amax of each group; 1 where amax is 0."""
    amax = amax.float()
    if dtype == torch.uint8:
        return four_bits.row_scale(amax)
    # A tensor divides; by a number CUDA multiplies with its reciprocal, which is other bits
    scale = (amax / amax.new_full((), QMAX[dtype])).clamp_(min=SCALE_MIN)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    granularity: Granularity,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Codes of `weight` under given scales.

    Works through the matrix in chunks of rows, so that memory beyond the result does not grow with
    its height.

    Args:
        weight: [..., N, K], fp16, bf16 or fp32. NaN and Inf are the caller's to refuse: see
            `check_finite`.
        scale: fp32, `scale_shape(granularity, weight.shape)`.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.
        granularity: what shares a scale.
        out: codes [..., N, K] to write into; made where absent.

    Returns:
        Codes [..., N, K] of `dtype`.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    expected = scale_shape(granularity, tuple(weight.shape))
    assert tuple(scale.shape) == expected, (tuple(scale.shape), expected)
    if weight.ndim > 2:
        for w, s, o in zip(weight, scale, out, strict=True):
            quantize(w, s, dtype, granularity, out=o)
        return out
    k = weight.shape[1]
    for rows in _row_chunks(weight, granularity):
        quotient = weight[rows].float() / _expand(scale, granularity, rows, k)
        out[rows].copy_(_within_range(quotient, dtype))
    return out


def dequantize(
    codes: Tensor,
    scale: Tensor,
    granularity: Granularity,
    *,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    group_scale: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """`codes * scale`, computed in fp32 and rounded once to `dtype`.

    Args:
        codes: [..., N, K], int8 or fp8; of four bits [..., N, packed(K)].
        scale: fp32, `scale_shape(granularity, [..., N, K], parts)`.
        granularity: what shares a scale.
        parts: projections stacked along N (2 for a w13 with gate and up).
        dtype: of the result.
        group_scale: [..., N, groups(K)], where codes have four bits.
        columns: K, likewise.
    """
    if group_scale is not None:
        codes = four_bits.decode(codes, group_scale)[..., :columns]
    *_, n, k = codes.shape
    if codes.ndim > 2:
        matrices = [
            dequantize(c, s, granularity, parts=parts, dtype=dtype)
            for c, s in zip(codes, scale, strict=True)
        ]
        return torch.stack(matrices) if matrices else torch.empty_like(codes, dtype=dtype)
    if parts > 1 and granularity is Granularity.BLOCK:
        halves = zip(codes.chunk(parts), scale.chunk(parts), strict=True)
        return torch.cat([dequantize(c, s, granularity, dtype=dtype) for c, s in halves])
    return (codes.float() * _expand(scale, granularity, slice(0, n), k)).to(dtype)


def quantize_activations(x: Tensor, scheme: OnlineQuantScheme) -> tuple[Tensor, Tensor]:
    """Quantize activations dynamically, as the activation-quantized schemes say.

    Args:
        x: [T, K], fp16, bf16 or fp32.
        scheme: one with `quantizes_activations`.

    Returns:
        Codes [T, K] in the scheme's dtype, and fp32 scales: [T, 1], one per token, or
        [T, ceil(K / 128)] under `Granularity.BLOCK`.
    """
    assert scheme.quantizes_activations, scheme
    dtype = scheme.weight_dtype
    if scheme.granularity is not Granularity.BLOCK:
        scale = scale_from_amax(x.abs().amax(-1), dtype)[:, None]
        return _within_range(x.float() / scale, dtype).to(dtype), scale
    scale = scale_from_amax(_block_max(x.abs(), dim=-1).float(), dtype)
    per_column = scale.repeat_interleave(BLOCK, dim=-1)[:, : x.shape[-1]]
    return _within_range(x.float() / per_column, dtype).to(dtype), scale


def check_finite(weight: Tensor, amax: Tensor, name: str) -> None:
    """Refuse NaN, Inf and what is above `LARGEST`, found through the amax of the weight.

    Args:
        weight: [..., N, K], looked through only where `amax` is none of a good weight.
        amax: of `weight`, any granularity.
        name: of the tensor in the checkpoint, for the message.

    Raises:
        NonFiniteError: with name, index of the first bad element, and how many there are.
    """
    if bool((amax.float() <= LARGEST).all()):
        return
    bad = ~(weight.float().abs() <= LARGEST)
    first = torch.nonzero(bad)[0].tolist()
    raise NonFiniteError(
        f"{name}: {weight[tuple(first)].item()} at {first},"
        f" {int(bad.sum())} of {weight.numel()} values are NaN, Inf or above {LARGEST:.3g}",
        hint="the checkpoint is damaged or was saved after a diverged step; get it again",
    )


def _within_range(quotient: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 quotients as numbers that codes of `dtype` can be, in place. The clamp catches quotients
    that fp32 rounded past qmax, and those of weights above an amax that other ranks agreed on."""
    if dtype == torch.int8:
        quotient.round_()
    return quotient.clamp_(-QMAX[dtype], QMAX[dtype])


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _magnitude(values: Tensor) -> Tensor:
    """|values| as integers of the same bits: ordered as they are, NaN above all, and compared three
    times as fast as bf16."""
    bits = _BITS[values.dtype.itemsize]
    return values.view(bits) & torch.iinfo(bits).max


def _row_chunks(weight: Tensor, granularity: Granularity) -> Iterator[slice]:
    """Rows of a matrix, a chunk at a time; blocks are never cut."""
    n, k = weight.shape
    unit = BLOCK if granularity is Granularity.BLOCK else 1
    elements = _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE)
    step = max(unit, elements // max(k, 1) // unit * unit)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _block_max(magnitude: Tensor, dim: int) -> Tensor:
    """Max over runs of 128 along `dim` (-1 or -2); the last run may be short."""
    size = magnitude.shape[dim]
    whole = size // BLOCK * BLOCK
    pieces = []
    if whole:
        pieces.append(_split(magnitude.narrow(dim, 0, whole), dim).amax(dim))
    if size > whole:
        pieces.append(magnitude.narrow(dim, whole, size - whole).amax(dim, keepdim=True))
    return torch.cat(pieces, dim) if pieces else magnitude


def _split(x: Tensor, dim: int) -> Tensor:
    """Split `dim` (-1 or -2) into runs of 128, which then lie at `dim`."""
    shape = list(x.shape)
    axis = x.ndim + dim
    return x.reshape(*shape[:axis], shape[axis] // BLOCK, BLOCK, *shape[axis + 1 :])


def _expand(scale: Tensor, granularity: Granularity, rows: slice, k: int) -> Tensor:
    """Scales of one matrix, broadcastable against its rows [rows, k]."""
    match granularity:
        case Granularity.TENSOR:
            return scale
        case Granularity.CHANNEL:
            return scale[rows, None]
        case Granularity.BLOCK:
            grid = scale[rows.start // BLOCK : blocks(rows.stop)]
            tall = grid.repeat_interleave(BLOCK, dim=0)[: rows.stop - rows.start]
            return tall.repeat_interleave(BLOCK, dim=1)[:, :k]
