"""MXFP4 written out by hand: what the docstring of `moeq.mxfp4` says, one group after the other, in
fp64, where nothing of it is rounded that should not be."""

from __future__ import annotations

import numpy as np

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def encode_group(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Stored codes of a group of weights in units of its row's scale, and the scale's byte."""
    largest = np.abs(x).max()
    exponent = max(np.frexp(largest)[1] - 1 if largest else -999, -115)
    unit = 2.0 ** (exponent - 10)
    whole = np.rint(x / unit)
    best: tuple[float, np.ndarray, int] | None = None
    for power in (exponent - 2, exponent - 1):
        steps = np.abs(whole) * unit / 2.0**power
        away = np.abs(steps[:, None] - MAGNITUDES)
        # Of two codes as near, the one without mantissa
        place = (away + np.arange(8) % 2 * 1e-9).argmin(1)
        error = float(np.square((steps - MAGNITUDES[place]) * 2.0**power / unit).sum())
        assert error == int(error) < 2**24
        if best is None or error < best[0]:
            best = error, place + 8 * ((whole < 0) & (place > 0)), power + 127
    assert best is not None
    return best[1], best[2]


def decode(packed: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Codes times group scales in fp64 [..., K] of bytes [..., K / 2] and [..., K / 32]."""
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    values = MAGNITUDES[codes & 7] * np.where(codes >= 8, -1.0, 1.0)
    return values * (2.0 ** (groups.astype(np.float64) - 127)).repeat(32, -1)
