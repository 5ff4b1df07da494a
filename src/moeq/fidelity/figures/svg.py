"""What figures are made of: the frame with its axes, marks, ticks, and text that fits.

Colours are left to the page's style, where light, dark and print differ: `c0` to `c7` tell series
apart, and each has a mark of its own too. Sizes are CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moeq.fidelity.words import text, visible

Write = Callable[[float], str]

SERIES = 8
"""Series get colours in turn, as many as eyes tell apart."""

LETTER, LARGE_LETTER = 7.3, 8.8
"""Widths of text are guessed: a letter of a wide font, at 11.5 px and at narrow screens' 14."""


def marker(series: int, x: float, y: float, r: float = 4) -> str:
    """The mark of a series, which tells it apart without its colour."""
    shape = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}"
        f"l{-1.3 * r:.1f} {-1.3 * r:.1f}z",
        f"M{x:.1f} {y + 1.2 * r:.1f}l{1.2 * r:.1f} {-2.1 * r:.1f}h{-2.4 * r:.1f}z",
    )[series % 5]
    return f'<path class="mark c{series % SERIES}" d="{shape}"/>'


def key_mark(series: int) -> str:
    """The same mark for running text."""
    return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{marker(series, 6, 6)}</svg>'


def figure(width: float, height: float, label: str, body: str) -> str:
    """An SVG element that says what it shows."""
    # Those that narrow screens shrink get larger letters there
    kind = ' class="large"' if width > 400 else ""
    w, h = f"{width:.0f}", f"{height:.0f}"
    return (
        f'<svg{kind} viewBox="0 0 {w} {h}" width="{w}" height="{h}"'
        f' role="img" aria-label="{text(label)}">{body}</svg>'
    )


def axis_title(x: float, y: float, title: str) -> str:
    return f'<text class="name" text-anchor="middle" x="{x:.1f}" y="{y:.0f}">{text(title)}</text>'


@dataclass(frozen=True)
class Plot:
    """A frame with axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def inner_width(self) -> int:
        return self.width - self.left - self.right

    @property
    def inner_height(self) -> int:
        return self.height - self.top - self.bottom

    @property
    def base(self) -> int:
        return self.height - self.bottom

    def x_tick(self, x: float, label: str) -> str:
        return (
            f'<path class="axis" d="M{x:.1f} {self.base}v5"/>'
            f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{self.base + 18}">'
            f"{text(label)}</text>"
        )

    def y_tick(self, y: float, label: str, *, grid: bool = False) -> str:
        """A short tick without a label."""
        across = f'<path class="grid" d="M{self.left} {y:.1f}h{self.inner_width}"/>' if grid else ""
        if not label:
            return f'<path class="axis" d="M{self.left} {y:.1f}h-3"/>'
        return (
            f'{across}<path class="axis" d="M{self.left} {y:.1f}h-5"/>'
            f'<text class="tick" text-anchor="end" x="{self.left - 8}" y="{y + 4:.1f}">'
            f"{text(label)}</text>"
        )

    def svg(self, body: str, label: str, x_title: str, y_title: str) -> str:
        middle = self.top + self.inner_height / 2
        end = self.width - self.right
        axes = (
            f'<path class="axis" d="M{self.left} {self.top}V{self.base}H{end}"/>'
            + axis_title(self.left + self.inner_width / 2, self.height - 8, x_title)
            + f'<text class="name" text-anchor="middle" transform="translate(17 {middle:.0f})'
            f' rotate(-90)">{text(y_title)}</text>'
        )
        return figure(self.width, self.height, label, axes + body)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    span = (high - low) or 1.0
    raw = span / max(count, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= 0.999 * raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def every(room: float, each: float) -> int:
    """How many items of `each` pixels go to a label that takes `room`, as a round number."""
    wanted = math.ceil(room / each)
    decade = 1
    while 10 * decade <= wanted:
        decade *= 10
    return next(m * decade for m in (1, 2, 5, 10) if m * decade >= wanted)


def cut(label: str, letters: int = 24) -> str:
    """The end of a long name, which differs where its start may not."""
    shown = visible(label)
    return shown if len(shown) <= letters else f"…{shown[1 - letters :]}"
