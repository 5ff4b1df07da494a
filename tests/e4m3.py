"""float8_e4m3fn written out by hand: s eeee mmm, bias 7, no infinities, NaN at 0x7F and 0xFF."""

from __future__ import annotations

import numpy as np


def _value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


MAGNITUDES = np.array([_value(code) for code in range(0x7F)])
"""Of the codes 0x00..0x7E, ascending: 0 to 448."""


def decode(codes: np.ndarray) -> np.ndarray:
    """uint8 codes -> fp64."""
    magnitude = np.append(MAGNITUDES, np.nan)[codes & 0x7F]
    return np.where(codes & 0x80, -magnitude, magnitude)


def encode(values: np.ndarray) -> np.ndarray:
    """Finite values within +-448 -> uint8 codes: the nearest, and the even one of two."""
    magnitude = np.abs(values.astype(np.float64))
    assert magnitude.max(initial=0) <= 448
    high = np.searchsorted(MAGNITUDES, magnitude).clip(1)
    low = high - 1
    to_low, to_high = magnitude - MAGNITUDES[low], MAGNITUDES[high] - magnitude
    tie_to_low = (to_low == to_high) & (low % 2 == 0)
    code = np.where((to_low < to_high) | tie_to_low, low, high)
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def spacing(values: np.ndarray) -> np.ndarray:
    """Distance between the neighbouring codes around values within +-448."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    return 2.0 ** (exponent - 3)
