"""Four bits to a weight, written out by hand: what the docstring of `moeq.int4` says, one group
after the other, in fp64, where next to nothing of it is rounded."""

from __future__ import annotations

import numpy as np

from tests import e4m3

GROUP = 32


def row_scales(weight: np.ndarray) -> np.ndarray:
    """fp32 [N] of weights [N, K]."""
    amax = np.abs(weight.astype(np.float64)).max(1, initial=0)
    exponent = np.frexp(amax)[1] - 1  # floor(log2 amax)
    scale = np.maximum(2.0 ** (exponent - 10.0), 2.0**-126)
    return np.where(amax == 0, 1, scale).astype(np.float32)


def encode_group(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Codes -8..7 of a group of weights in units of its row's scale, and the group scale's byte."""
    largest = x[np.argmax(np.abs(x))]
    if -largest in x:  # of two as large, the positive one becomes -8
        largest = abs(largest)
    magnitude = abs(largest)
    unit = 2.0 ** (np.floor(np.log2(max(magnitude, 2.0**-6))) - 10)
    whole = np.rint(x / unit)
    # The largest e4m3 number that is not above the quotient, were there subnormals of 4 bits too
    fraction, exponent = np.frexp(magnitude / 8)
    below = int(exponent + 6) * 8 + int(fraction * 16) - 8 if magnitude else 0
    best: tuple[float, np.ndarray, int] | None = None
    for distance in (0, 1, -1, 2):
        byte = max(below + distance, 0x08)
        value = e4m3.MAGNITUDES[byte] * (-1 if largest >= 0 else 1) / unit
        # Of two codes as near, the one that fp32 takes: a division that became a product
        quotient = whole.astype(np.float32) * np.reciprocal(np.float32(value))
        codes = np.rint(quotient.clip(-8, 7)).astype(np.float64)
        error = float(np.square(whole - codes * value).sum())
        assert error == int(error) < 2**24
        if best is None or error < best[0]:
            best = error, codes, byte
    assert best is not None
    return best[1], best[2] | (0x80 if largest >= 0 else 0)


def encode(
    weight: np.ndarray, scale: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of codes [N, 16 * G] and of group scales [N, G], and scales of rows, of [N, K]."""
    n, k = weight.shape
    scale = row_scales(weight) if scale is None else scale
    x = np.zeros((n, -(-k // GROUP) * GROUP))
    x[:, :k] = weight.astype(np.float64) / scale.astype(np.float64)[:, None]
    codes, groups = np.zeros(x.shape), np.zeros((n, x.shape[1] // GROUP), dtype=np.uint8)
    for row, group in np.ndindex(groups.shape):
        here = row, slice(group * GROUP, (group + 1) * GROUP)
        codes[here], groups[row, group] = encode_group(x[here])
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, groups, scale


def decode(packed: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Codes times group scales in fp64 [..., K] of bytes [..., K / 2] and [..., K / 32]."""
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1) - 8.0
    return codes * e4m3.decode(groups).repeat(GROUP, -1)
