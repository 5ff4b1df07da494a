"""int4 codes under e4m3 scales, chosen by the squared error that they leave.

    w'           = code * group_scale * scale    code -8..7, see `moeq.four_bits`
    group_scale                                  e4m3, of 32 columns: the weight of largest
                                                 magnitude becomes about -8, so it has a sign

Of the e4m3 numbers near |largest| / 8 the one is taken under which the codes are nearest to the
weights. Every candidate is tried with its own codes, so nothing is left to refine: weights times
the fp32 reciprocal of their scales, rounded half to even. So few bits make `code * group_scale`
exact in bf16 and fp16, and so is `group_scale * scale` in bf16, for formats that have one scale.

A group is first rounded to 11 bits of its largest weight. Squared errors are then integers whose
sum is below 2^24, which fp32 adds exactly in any order: the bytes do not depend on device or
chunking. A code is stored as 8 more than its value.

Measured against the alternatives in benchmarks/LOG.md: zero points, scales in fp16, other groups,
e2m1 codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = tuple(range(-8, 8))
"""Of stored codes."""

ZERO = 0x88
"""Two codes that mean zero."""

_CANDIDATES = (0, 1, -1, 2)
"""Of group scales: distance in e4m3 numbers from the largest one below |largest| / 8. Of equally
good ones the first is taken."""

_E4M3_BIAS = 120 << 3
"""What the top bits of an fp32 number exceed those of the same number in e4m3 by."""

_PRECISION = 10
"""Bits of a group's largest weight after the first that count."""

_LEAST_BITS = (127 - 6) << 23
"""2^-6, the smallest group scale, in fp32. Groups below are rounded to bits of that."""

_E4M3_LEAST = 0x08
"""2^-6, the smallest normal one: a group that needs less is below 2^-13 of its row."""


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stored codes and group scales of groups [32, G] in units of their rows' scales, fp32; x is
    overwritten. Codes are uint8 [32, G], scales bytes in int32 [G]."""
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
        candidate = (least + distance).clamp_(min=_E4M3_LEAST)
        value = ((candidate + _E4M3_BIAS) << 20).view(torch.float32) / unit
        torch.mul(x, value.reciprocal(), out=code).clamp_(-8, 7).round_()
        error = torch.sub(x, code.mul_(value), out=code).square_().sum(0)
        byte = torch.where(error < fewest, candidate, byte)
        fewest = torch.minimum(fewest, error)
    value = ((byte + _E4M3_BIAS) << 20).view(torch.float32) / unit
    torch.mul(x, value.reciprocal(), out=code).clamp_(-8, 7).round_().add_(8)
    byte |= (sign < 0).int() << 7
    return code.to(torch.uint8), byte


def are_scales(group_scale: Tensor) -> bool:
    """Whether group scales are such as `encode` makes: of either sign, but normal numbers."""
    magnitude = group_scale.view(torch.uint8) & 0x7F
    return bool(((magnitude >= _E4M3_LEAST) & (magnitude < 0x7F)).all())
