"""How a report's page writes numbers and names: for people, and safe inside HTML.

Three significant digits, except where they would hide what is asked: agreements near 100 % show
how far from it they are, perplexities get five.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from datetime import datetime

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(value: object) -> str:
    """Anything for HTML, attributes included."""
    return html.escape(visible(value))


def visible(value: object) -> str:
    """What has no glyph of its own (controls, direction marks, lone surrogates) as an escape.

    A name from a checkpoint could otherwise look like another, or make the file unwritable.
    """
    return "".join(
        c if c.isprintable() or c == "\u00a0" else c.encode("unicode_escape").decode()
        for c in str(value)
    )


def breakable(name: str) -> str:
    """A long name may go on in a new line after each _ and dot."""
    return re.sub(r"(?<=[_.])(?=[^_.<])", "<wbr>", text(name))


def number(value: float, digits: int = 3) -> str:
    """0.00041234 -> '0.000412', 0.0000041234 -> '4.12 × 10⁻⁶', 1234.5 -> '1,234'."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    # Of the rounded value: 0.9999 is 1.00 and not 1.000
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if -6 < exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")
    mantissa = f"{value / 10.0**exponent:.{digits - 1}f}".replace("-", "−")
    return f"{mantissa}\u00a0×\u00a010{str(exponent).translate(_SUPERSCRIPT)}"


def perplexity(value: float) -> str:
    """10.43456 -> '10.435'."""
    return number(value, 5)


def percent(share: float) -> str:
    """0.0123456 -> '1.23 %'."""
    return f"{number(100 * share)}\u00a0%" if math.isfinite(share) else number(share)


def round_percent(share: float) -> str:
    """Of ticks: 0.005 -> '0.5 %'."""
    return f"{100 * share:.6g}\u00a0%"


def agreement(share: float) -> str:
    """0.99712 -> '99.7 %', 0.99971 -> '99.97 %'; '100 %' is all of them, and nothing less."""
    return _agreement(share, _decimals(share))


def _decimals(share: float) -> int:
    missing = 100 * (1 - share)
    return min(4, max(1, -math.floor(math.log10(missing) + 1e-6))) if missing > 0 else 0


def _agreement(share: float, decimals: int) -> str:
    if not math.isfinite(share):
        return number(share)
    # Rounded down, so that it reads 100 only where it is
    return f"{math.floor(100 * share * 10**decimals + 1e-6) / 10**decimals:.{decimals}f}\u00a0%"


def change(ratio: float) -> str:
    """1.00052 -> '+0.05 %'."""
    if not math.isfinite(ratio):
        return number(ratio)
    hundredths = round(10_000 * (ratio - 1))
    return f"{hundredths / 100:{'+' if hundredths else ''}.2f}\u00a0%".replace("-", "−")


def interval(low: float, high: float, write: Callable[[float], str]) -> str:
    """'0.000310–0.000520', '99.70–99.96 %', '−0.01 to +0.05 %', '(6.35–7.56) × 10⁻⁷'."""
    if write is agreement and math.isfinite(low) and math.isfinite(high):
        decimals = max(_decimals(low), _decimals(high))
        first, second = _agreement(low, decimals), _agreement(high, decimals)
    else:
        first, second = write(low), write(high)
    start, _, unit = first.partition("\u00a0")
    end, _, other = second.partition("\u00a0")
    if unit != other:
        return f"{first} to {second}"
    # Where there are signs, a dash could be one
    both = f"{start} to {end}" if {"−", "+"} & set(start + end) else f"{start}–{end}"
    if not unit:
        return both
    return f"{both}\u00a0{unit}" if unit == "%" else f"({both})\u00a0{unit}"


def share_of_bytes(share: float) -> str:
    """0.503 -> 'half the bytes', 0.641 -> '64.1 % of the bytes'."""
    return "half the bytes" if abs(share - 0.5) < 0.01 else f"{percent(share)} of the bytes"


def day(iso: str) -> str:
    """'2026-11-23T17:00:00+00:00' -> '23 November 2026, 17:00 UTC'; what is no date stays as is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}, {when:%H:%M}{zone}"


# strftime would take them from the locale
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
