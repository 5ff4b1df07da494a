"""Four bits to a weight under a scale of every 32: how codes lie, and the scale of their row.

    w' = code * group_scale * scale

The dtype of the group scales says what codes are: e4m3fn `moeq.int4`, e8m0fnu `moeq.mxfp4`. The
scale of a row is a power of two near its amax, fp32; group scales are relative to it, so they need
little range and their products with codes are exact in bf16 and fp16.

Two codes lie in a byte, the even column in the low half: the order of compressed-tensors and of the
OCP's formats. A row is filled up to whole groups with codes that mean zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from moeq import int4, mxfp4
from moeq.schemes import GROUP

QMAX = 1024.0
"""Of a row's scale its amax is at least so many, and less than twice."""

GROUP_BYTES = GROUP // 2
"""Of the codes of a group."""

CODES: dict[torch.dtype, ModuleType] = {
    torch.float8_e4m3fn: int4,
    torch.float8_e8m0fnu: mxfp4,
}
"""What codes are, by the dtype of their group scales."""

_CHUNK = {"cpu": 1 << 17}
"""Weights worked on at a time, by device type: what a core's second cache holds in fp32, twice."""

_CHUNK_ELSEWHERE = 1 << 24


def groups(columns: int) -> int:
    """How many groups a row has; the last may be filled up."""
    return -(-columns // GROUP)


def packed(columns: int) -> int:
    """Bytes of a row's codes."""
    return groups(columns) * GROUP_BYTES


def row_scale(amax: Tensor) -> Tensor:
    """2^(floor(log2 amax) - 10), at least 2^-126, 1 where amax is 0: fp32 scale of rows from their
    amax; Inf where that is NaN or Inf."""
    power = (amax.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, 1.0, (power / QMAX).clamp_(min=torch.finfo(torch.float32).tiny))


def quantize(weight: Tensor, scale: Tensor, codes: Tensor, group_scale: Tensor) -> None:
    """Codes and group scales of a matrix under the scales of its rows, some rows at a time.

    Args:
        weight: [N, K], fp16, bf16 or fp32. NaN and Inf are the caller's to refuse.
        scale: fp32 [N], as `row_scale` has them for these rows or for wider ones.
        codes: uint8 [N, packed(K)]; written.
        group_scale: a dtype of `CODES`, [N, groups(K)]; written.
    """
    encode = CODES[group_scale.dtype].encode
    k = weight.shape[1]
    for rows in _row_chunks(weight):
        some = weight[rows]
        x = some.new_zeros(len(some), groups(k) * GROUP, dtype=torch.float32)
        x[:, :k].copy_(some)
        x = x.view(len(some), -1, GROUP).mul_(scale[rows].reciprocal()[:, None, None])
        # [32, groups]: operators run along groups
        code, byte = encode(x.view(-1, GROUP).t().contiguous())
        group_scale[rows].view(torch.uint8).copy_(byte.view(len(some), -1))
        pairs = code[0::2].add_(code[1::2], alpha=16)
        codes[rows].view(-1, GROUP_BYTES).copy_(pairs.t())


def decode(codes: Tensor, group_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`code * group_scale` of codes [..., N, packed(K)], exactly: [..., N, 32 * groups(K)] in fp32
    or bf16."""
    assert codes.dtype == torch.uint8, codes.dtype
    pairs = _pairs(group_scale.dtype, dtype, codes.device)
    values = pairs.index_select(0, codes.reshape(-1).int()).view(dtype)
    grouped = values.view(*group_scale.shape, GROUP).mul_(group_scale.to(dtype)[..., None])
    return grouped.flatten(-2)


@functools.cache
def _pairs(kind: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each byte holds, as two numbers of `dtype` in one integer: [256]."""
    byte, values = torch.arange(256), torch.tensor(CODES[kind].VALUES, dtype=torch.float32)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1).to(dtype)
    word = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    return pairs.view(word).flatten().to(device)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    n, k = weight.shape
    elements = _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE)
    step = max(1, elements // max(k, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
