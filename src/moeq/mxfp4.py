"""The OCP's MXFP4: e2m1 codes under scales that are powers of two, without loss where it has none.

    w'           = code * group_scale * scale    code 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives,
                                                 see `moeq.four_bits`
    group_scale                                  e8m0, of 32 columns

A group's largest weight is between 4 and 8 under 2^(floor(log2 largest) - 2), which is the scale of
the format's own conversion, and between 2 and 4 under the next; what is above 6 becomes 6. The one
is taken under which the codes are nearest to the weights. Under the first a group that was MXFP4
before keeps its values, whatever its scale was.

A group is first rounded to 11 bits of its largest weight. Squared errors are then whole numbers,
and the bytes do not depend on device or chunking.

A stored code is a sign above two bits of exponent and one of mantissa; zero has no sign. The format
is https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf; its scale
is `group_scale * scale`, exactly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

VALUES = tuple(sign * m for sign in (1, -1) for m in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""Of stored codes."""

ZERO = 0x00
"""Two codes that mean zero."""

_PRECISION = 10
"""Bits of a group's largest weight after the first that count."""

_E8M0_LEAST = 10
"""2^-117, the smallest group scale: a group that needs less is below 2^-124 of its row."""

_E8M0_NAN = 0xFF

_LARGEST = 1 << (_PRECISION + 1)
"""What weights of a group can be rounded to, as whole numbers."""

_STEPS = (256, 512)
"""What a code of 1 is in whole numbers, under the format's own scale and under the next."""


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stored codes and group scales of groups [32, G] in units of their rows' scales, fp32; x is
    overwritten. Codes are uint8 [32, G], scales bytes in int32 [G]."""
    exponent = (x.abs().amax(0).view(torch.int32) >> 23).clamp_(min=_E8M0_LEAST + 2)
    whole = x.mul_(((254 + _PRECISION - exponent) << 23).view(torch.float32)).round_().int()
    whole.add_(_LARGEST)
    codes, errors = _tables(x.device)
    both = errors.index_select(0, whole.view(-1)).view(whole.shape).sum(0)
    wider = (both >> 32) < (both & 0xFFFFFFFF)
    whole.add_(wider.int() * (len(codes) // 2))
    return codes.index_select(0, whole.view(-1)).view(whole.shape), exponent - 2 + wider


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every whole number that a weight can be, from `-_LARGEST`: the nearest code under each of
    `_STEPS`, uint8 [2 * n], of two the even one; and the square of what is missing, under the
    second 2^32 times as much, int64 [n]."""
    x = torch.arange(-_LARGEST, _LARGEST + 1)
    values = torch.tensor(VALUES, dtype=torch.float32)  # whatever the default is
    codes, errors = [], []
    for step in _STEPS:
        distance = (x[:, None] - step * values).abs()
        nearest = (2 * distance + torch.arange(16) % 2).argmin(1)  # the first: no negative zero
        codes.append(nearest.to(torch.uint8))
        errors.append(distance.gather(1, nearest[:, None])[:, 0].square().long())
    return torch.cat(codes).to(device), (errors[0] | errors[1] << 32).to(device)


def are_scales(group_scale: Tensor) -> bool:
    """Whether group scales are such as `encode` makes."""
    byte = group_scale.view(torch.uint8)
    return bool(((byte >= _E8M0_LEAST) & (byte < _E8M0_NAN)).all())
