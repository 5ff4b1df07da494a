"""int4 codes arranged for PyTorch's own product on CPUs, in place: the same bytes, elsewhere.

    y = x @ ((q - 8) * scale + zero).T        _weight_int4pack_mm_for_cpu, bf16, zero = 0 here

A matrix is cut into blocks of B rows: 64 with AVX-512, 32 with AVX2. Its bytes go from

    codes        [N / B, 2, B / 2, K / 2]     a byte: columns 2j and 2j + 1 of a row, as in files
    group_scale  [N, K / 32]
to
    codes        [N / B, K, B / 2]            a byte: rows r and r + B / 2 of a column
    group_scale  [K / 32, N]

The arrangement is the machine's, and never saved. It shows in the tensors: arranged codes are int32
[..., N, K / 8], group scales [..., K / 32, N], so that who expects the order of files does not take
them. How the operator reads codes is found out by asking it, once; where it is in no way that we
know, or where blocks or groups are not whole, nothing is arranged and `moeq.kernels.cpu` decodes.

The operator is for few rows of bf16. With many a decoded tile is cheaper, and in fp32 and fp16 the
operator is scalar. Scales of rows are the caller's. Left out: group scales as the operator takes
them (4 bytes instead of 1), which would save 30 of the 145 us that a cold 1536 x 2048 takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from moeq.schemes import GROUP

_OPERATOR_ROWS = 64
"""Rows of a run up to which the operator is faster than a decoded tile (benchmarks/LOG.md)."""

_TILE = 1 << 20
"""Codes decoded at a time, as in `moeq.kernels.cpu`."""

_CHUNK = 1 << 20
"""Bytes arranged at a time."""

_BIAS = 120 << 7
"""What the bits of a normal e4m3 number, moved to where bf16 has them, lack in the exponent."""


def is_arranged(codes: Tensor) -> bool:
    """Whether codes lie as the operator wants them."""
    return codes.dtype == torch.int32


def can_arrange(kind: torch.dtype, n: int, k: int) -> bool:
    """Whether matrices [N, K] with group scales of such a dtype can lie so here."""
    rows = _block_rows()
    return (
        kind == torch.float8_e4m3fn
        and rows > 0
        and n > 0
        and k > 0
        and n % rows == 0
        and k % GROUP == 0
    )


def arrange(codes: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rearrange matrices that `can_arrange` accepts, in place.

    Args:
        codes: uint8 [..., N, packed(K)], contiguous; overwritten.
        group_scale: e4m3fn [..., N, groups(K)], contiguous; overwritten.

    Returns:
        The same memory as int32 [..., N, packed(K) / 4] and e4m3fn [..., groups(K), N].
    """
    _arrange_codes(codes, _block_rows())
    return codes.view(torch.int32), _transpose(group_scale)


def restore(codes: Tensor, group_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What `arrange` returned back into what it was given, in place."""
    rows, plain = _block_rows(), codes.view(torch.uint8)
    width = plain.shape[-1]
    for chunk in _chunks(plain, rows):
        pairs = chunk.view(-1, width, 2, rows // 2)
        first, second = _exchange(pairs[:, :, 0], pairs[:, :, 1])
        # [blocks, 2, B / 2, K / 2]
        chunk.copy_(torch.stack((first.mT, second.mT), 1).view_as(chunk))
    return plain, _transpose(group_scale)


def runs_of_arranged(
    rows: Tensor, runs: Iterable[tuple[int, int, int]], codes: Tensor, group: Tensor
) -> Tensor:
    """Every run times the matrix of its expert.

    Args:
        rows: bf16 or fp32 [R, K], contiguous.
        runs: (expert, start, stop), which cover the R rows.
        codes: int32 [E, N, K / 8], arranged.
        group: e4m3fn [E, K / 32, N], likewise.

    Returns:
        [R, N] in the dtype of the rows.
    """
    n, plain, scales = codes.shape[1], codes.view(torch.uint8), group.view(torch.int8)
    most = _OPERATOR_ROWS if rows.dtype == torch.bfloat16 else 0
    k, half = rows.shape[1], _block_rows() // 2
    room = codes.new_empty(group.shape[1:])
    tiles: Tensor | None = None  # made once: fresh memory costs more in page faults than decoding
    pieces = [rows.new_empty(0, n)]
    for expert, start, stop in runs:
        some, scale = rows[start:stop], _widen(scales[expert], room)
        if stop - start <= most:
            both = scale.view(torch.bfloat16).view(*scale.shape, 2)
            pieces.append(_multiply(some, plain[expert], both))
        else:
            if tiles is None:
                blocks = min(n // (2 * half), max(1, _TILE // (2 * half * k)))
                tiles = rows.new_empty(k, blocks, 2, half, dtype=torch.bfloat16)
            pieces.append(_multiply_decoded(some, plain[expert], scale, tiles))
    return torch.cat(pieces)


def _multiply(x: Tensor, codes: Tensor, scale_and_zero: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scale_and_zero)
    return y


def _widen(scale: Tensor, room: Tensor) -> Tensor:
    """e4m3 bits, int8 [groups, N] -> int32 in `room`: a bf16 scale below a bf16 zero.

    The bits only move, as all group scales are normal numbers: sign-extended and shifted left by 4
    they are s sss... s eeee mmm 0000, of which the copies of the sign are cleared.
    """
    return room.copy_(scale).mul_(16).bitwise_and_(0x87FF).add_(_BIAS)


def _multiply_decoded(x: Tensor, codes: Tensor, scale: Tensor, room: Tensor) -> Tensor:
    """x [R, K], codes [N, packed(K)] and `_widen`ed scales [groups, N] -> [R, N]. Some blocks at a
    time become weights [K, n] in `room`, bf16 [K, blocks, 2, B / 2]."""
    k, step, _, half = room.shape
    factor = scale.view(torch.bfloat16)[:, 0::2].contiguous()
    products = []
    for blocks, factors in zip(
        torch.split(codes.view(-1, k, half), step),
        torch.split(factor, 2 * half * step, dim=1),
        strict=True,
    ):
        tile = room.view(-1)[: k * len(blocks) * 2 * half].view(k, len(blocks), 2, half)
        for part, nibbles in enumerate((blocks & 15, blocks >> 4)):
            tile[:, :, part].copy_(nibbles.view(torch.int8).sub_(8).transpose(0, 1))
        weights = tile.view(k // GROUP, GROUP, -1).mul_(factors[:, None]).view(k, -1)
        products.append(x @ weights.to(x.dtype))
    return torch.cat(products, 1)


def _arrange_codes(codes: Tensor, rows: int) -> None:
    width = codes.shape[-1]
    for chunk in _chunks(codes, rows):
        pairs = chunk.view(-1, 2, rows // 2, width)
        even, odd = _exchange(pairs[:, 0], pairs[:, 1])
        # [blocks, K / 2, 2, B / 2]
        chunk.copy_(torch.stack((even.mT, odd.mT), 2).view_as(chunk))


def _chunks(codes: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Some blocks of rows at a time: a block has the same bytes before and after."""
    block = rows * codes.shape[-1]
    return torch.split(codes.view(-1, block), max(1, _CHUNK // block))


def _exchange(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The low halves of a and b in one byte, the high ones in another; its own inverse."""
    return (a & 15).bitwise_or_(b << 4), (a >> 4).bitwise_or_(b & 0xF0)


def _transpose(scale: Tensor) -> Tensor:
    """[..., a, b] -> [..., b, a], in place, a matrix at a time."""
    *lead, a, b = scale.shape
    for matrix in scale.view(torch.uint8).view(-1, a, b):
        matrix.view(b, a).copy_(matrix.t().clone(memory_format=torch.contiguous_format))
    return scale.view(*lead, b, a)


@functools.cache
def _block_rows() -> int:
    """Rows of a block that make the operator's product the right one; 0 where none do."""
    n, k = 128, 2 * GROUP
    values = torch.arange(n * k).mul_(40503).div_(64, rounding_mode="floor").view(n, k) % 16
    scale = torch.arange(n * 2, dtype=torch.uint8).view(2, n) % 100 + 8  # e4m3 of both signs
    scale.view(-1)[::3] |= 0x80
    wide = _widen(scale.view(torch.int8), torch.empty(2, n, dtype=torch.int32))
    both = wide.view(torch.bfloat16).view(2, n, 2)
    exact = scale.view(torch.float8_e4m3fn).float().t().repeat_interleave(GROUP, 1)
    weight = ((values - 8) * exact).bfloat16()
    packed = (values[:, 0::2] | values[:, 1::2] << 4).to(torch.uint8)
    for rows in (64, 32):
        codes = packed.clone()
        _arrange_codes(codes, rows)
        found = _multiply(torch.eye(k, dtype=torch.bfloat16), codes, both)
        if torch.equal(found.t(), weight):
            return rows
    return 0
