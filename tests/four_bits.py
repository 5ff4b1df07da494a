"""Four bits to a weight, written out by hand: what the docstring of `moeq.four_bits` says."""

from __future__ import annotations

import numpy as np

from moeq.schemes import OnlineQuantScheme
from tests import int4, mxfp4

GROUP = 32

SCHEMES = [scheme for scheme in OnlineQuantScheme if scheme.group is not None]

BY_HAND = {
    OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY: int4,
    OnlineQuantScheme.MXFP4_WEIGHT_ONLY: mxfp4,
}

ZERO = {
    OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY: 8,
    OnlineQuantScheme.MXFP4_WEIGHT_ONLY: 0,
}
"""The stored code that means zero."""

LEAST = {
    OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY: 0x08,
    OnlineQuantScheme.MXFP4_WEIGHT_ONLY: 10,
}
"""The smallest group scale."""


def row_scales(weight: np.ndarray) -> np.ndarray:
    """fp32 [N] of weights [N, K]."""
    amax = np.abs(weight.astype(np.float64)).max(1, initial=0)
    exponent = np.frexp(amax)[1] - 1  # floor(log2 amax)
    scale = np.maximum(2.0 ** (exponent - 10.0), 2.0**-126)
    return np.where(amax == 0, 1, scale).astype(np.float32)


def encode(
    weight: np.ndarray, scheme: OnlineQuantScheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of codes [N, 16 * G] and of group scales [N, G], and scales of rows, of [N, K]."""
    n, k = weight.shape
    scale = row_scales(weight)
    x = np.zeros((n, -(-k // GROUP) * GROUP))
    x[:, :k] = weight.astype(np.float64) / scale.astype(np.float64)[:, None]
    codes, groups = np.zeros(x.shape, np.uint8), np.zeros((n, x.shape[1] // GROUP), np.uint8)
    for row, group in np.ndindex(groups.shape):
        here = row, slice(group * GROUP, (group + 1) * GROUP)
        codes[here], groups[row, group] = BY_HAND[scheme].encode_group(x[here])
    return codes[:, 0::2] | codes[:, 1::2] << 4, groups, scale


def decode(scheme: OnlineQuantScheme, packed: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Codes times group scales in fp64 [..., K] of bytes [..., K / 2] and [..., K / 32]."""
    found: np.ndarray = BY_HAND[scheme].decode(packed, groups)
    return found
