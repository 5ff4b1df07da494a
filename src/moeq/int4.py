"""Four bits to a weight: codes under a scale of every 32, chosen by the squared error they leave.

    w'     = code * group_scale * scale          code -8..7
    scale  = 2^(floor(log2 amax) - 10)           of a row, at least 2^-126; 1 where amax is 0
    group_scale                                  e4m3, of 32 columns: the weight of largest
                                                 magnitude becomes about -8, so it has a sign

Of the e4m3 numbers near |largest| / 8 the one is taken under which the codes are nearest to the
weights. Every candidate is tried with its own codes, so nothing is left to refine: weights times
the fp32 reciprocal of their scales, rounded half to even. So few bits make `code * group_scale`
exact in bf16 and fp16, and so is `group_scale * scale` in bf16, for formats that have one scale.

A group is first rounded to 11 bits of its largest weight. Squared errors are then integers whose
sum is below 2^24, which fp32 adds exactly in any order: the bytes do not depend on device or
chunking.

Two codes lie in a byte, the even column in the low half, each 8 more than its value: the order of
compressed-tensors. A row is filled up to whole groups with codes that mean zero.

Measured against the alternatives in benchmarks/LOG.md: zero points, scales in fp16, other groups,
e2m1 codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeq.schemes import GROUP

QMAX = 1024.0
"""Of a row's scale its amax is at least so many, and less than twice."""

GROUP_BYTES = GROUP // 2
"""Of the codes of a group."""

ZERO = 0x88
"""Two codes that mean zero."""

_CANDIDATES = (0, 1, -1, 2)
"""Of group scales: distance in e4m3 numbers from the largest one below |largest| / 8. Of equally
good ones the first is taken."""

_CHUNK = {"cpu": 1 << 17}
"""Weights worked on at a time, by device type: what a core's second cache holds in fp32, twice."""

_CHUNK_ELSEWHERE = 1 << 24

_E4M3_BIAS = 120 << 3
"""What the top bits of an fp32 number exceed those of the same number in e4m3 by."""

_PRECISION = 10
"""Bits of a group's largest weight after the first that count."""

_LEAST_BITS = (127 - 6) << 23
"""2^-6, the smallest group scale, in fp32. Groups below are rounded to bits of that."""

E4M3_LEAST = 0x08
"""2^-6, the smallest normal one: a group that needs less is below 2^-13 of its row."""


def groups(columns: int) -> int:
    """How many groups a row has; the last may be filled up."""
    return -(-columns // GROUP)


def packed(columns: int) -> int:
    """Bytes of a row's codes."""
    return groups(columns) * GROUP_BYTES


def row_scale(amax: Tensor) -> Tensor:
    """fp32 scale of rows from their amax; Inf where that is NaN or Inf."""
    power = (amax.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, (power / QMAX).clamp_(min=torch.finfo(torch.float32).tiny))


def quantize(weight: Tensor, scale: Tensor, codes: Tensor, group_scale: Tensor) -> None:
    """Codes and group scales of a matrix under the scales of its rows, some rows at a time.

    Args:
        weight: [N, K], fp16, bf16 or fp32. NaN and Inf are the caller's to refuse.
        scale: fp32 [N], as `row_scale` has them for these rows or for wider ones.
        codes: uint8 [N, packed(K)]; written.
        group_scale: e4m3fn [N, groups(K)]; written.
    """
    for rows in _row_chunks(weight):
        _encode(weight[rows], scale[rows], codes[rows], group_scale[rows])


def decode(codes: Tensor, group_scale: Tensor) -> Tensor:
    """`code * group_scale` of codes [..., N, packed(K)] in fp32: [..., N, 32 * groups(K)]."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).float().sub_(8)
    grouped = pairs.view(*group_scale.shape, GROUP).mul_(group_scale.float()[..., None])
    return grouped.flatten(-2)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    n, k = weight.shape
    elements = _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE)
    step = max(1, elements // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _encode(weight: Tensor, scale: Tensor, codes: Tensor, group_scale: Tensor) -> None:
    n, k = weight.shape
    x = weight.new_zeros(n, groups(k) * GROUP, dtype=torch.float32)
    x[:, :k].copy_(weight)
    x = x.view(n, -1, GROUP).mul_(scale.reciprocal()[:, None, None])
    # [32, groups]: operators run along groups
    x = x.view(-1, GROUP).t().contiguous()
    high, low = x.amax(0), x.amin(0).neg_()
    sign = torch.where(high >= low, -1.0, 1.0)
    bits = torch.maximum(high, low).view(torch.int32)
    least = (bits >> 20) - (3 << 3) - _E4M3_BIAS
    unit = (bits.clamp_(min=_LEAST_BITS) & 0x7F800000).view(torch.float32) * 2.0**-_PRECISION
    x.div_(unit).round_()
    unit.mul_(sign)
    fewest, byte = torch.full_like(unit, torch.inf), torch.empty_like(least)
    code = torch.empty_like(x)
    for distance in _CANDIDATES:
        candidate = (least + distance).clamp_(min=E4M3_LEAST)
        value = ((candidate + _E4M3_BIAS) << 20).view(torch.float32) / unit
        torch.mul(x, value.reciprocal(), out=code).clamp_(-8, 7).round_()
        error = torch.sub(x, code.mul_(value), out=code).square_().sum(0)
        byte = torch.where(error < fewest, candidate, byte)
        fewest = torch.minimum(fewest, error)
    value = ((byte + _E4M3_BIAS) << 20).view(torch.float32) / unit
    torch.mul(x, value.reciprocal(), out=code).clamp_(-8, 7).round_().add_(8)
    byte |= (sign < 0).int() << 7
    group_scale.view(torch.uint8).copy_(byte.view(n, -1))
    pairs = code[0::2].add_(code[1::2], alpha=16)
    codes.view(-1, GROUP_BYTES).copy_(pairs.to(torch.uint8).t())
