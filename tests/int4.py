"""int4 written out by hand: what the docstring of `moeq.int4` says, one group
after the other, in fp64, where next to nothing of it is rounded."""

from __future__ import annotations

import numpy as np

from tests import e4m3

GROUP = 32


def encode_group(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Stored codes of a group of weights in units of its row's scale, and the scale's byte."""
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
    return best[1] + 8, best[2] | (0x80 if largest >= 0 else 0)


def decode(packed: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Codes times group scales in fp64 [..., K] of bytes [..., K / 2] and [..., K / 32]."""
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1) - 8.0
    return codes * e4m3.decode(groups).repeat(GROUP, -1)
