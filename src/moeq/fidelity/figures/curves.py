"""Points with intervals on a log axis, and lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeq.fidelity.figures.svg import LETTER, SERIES, Plot, Write, marker, ticks
from moeq.fidelity.words import number, text, visible


@dataclass(frozen=True)
class Point:
    """A scheme in `cost_figure`: x, and y with its interval."""

    name: str
    x: float
    y: float
    low: float
    high: float


def cost_figure(
    points: Sequence[Point],
    *,
    reference: Point,
    write_x: Write,
    x_title: str,
    y_title: str,
) -> str:
    """y on a log axis against x, with intervals.

    Args:
        points: one a scheme.
        reference: bf16: its x is a line up, its y and interval are the noise floor, a band across.
            A y that is not finite is no floor.
        write_x: an x for people.
        x_title: what x is.
        y_title: what y is.
    """
    known = [p for p in (*points, reference) if 0 < p.y < math.inf]
    bounds = [v for p in known for v in (p.y, p.low, p.high) if 0 < v < math.inf]
    top = math.ceil(math.log10(max(bounds, default=1.0)) + 0.05)
    # An interval that reaches far down is cut, so that it does not set the scale
    least = min((p.y for p in known), default=0.1)
    bottom = math.floor(max(math.log10(min(bounds, default=0.1)), math.log10(least) - 1) - 0.05)
    plot = Plot(width=620, height=350, left=86, right=26, top=12, bottom=46)
    right = 1.06 * max(p.x for p in (*points, reference))

    def x_of(x: float) -> float:
        return plot.left + x / right * plot.inner_width

    def y_of(y: float) -> float:
        decades = math.log10(y) if y > 0 else bottom
        share = (min(max(decades, bottom), top) - bottom) / (top - bottom)
        return plot.top + (1 - share) * plot.inner_height

    parts = []
    for decade in range(bottom, top + 1):
        parts.append(plot.y_tick(y_of(10.0**decade), _power(decade)))
        if decade < top:
            parts += [plot.y_tick(y_of(m * 10.0**decade), "") for m in range(2, 10)]
    parts += [plot.x_tick(x_of(x), write_x(x)) for x in ticks(0, right, 6)]
    if 0 < reference.y < math.inf:
        y, high, low = y_of(reference.y), y_of(reference.high), y_of(reference.low)
        end = plot.left + plot.inner_width
        parts.append(
            f'<rect class="band" x="{plot.left}" y="{high:.1f}" width="{plot.inner_width}"'
            f' height="{max(low - high, 0.5):.1f}"/>'
            f'<path class="floor" d="M{plot.left} {y:.1f}H{end}"/>'
            f'<text class="note" x="{plot.left + 8}" y="{high - 5:.1f}">noise floor</text>'
        )
    parts.append(
        f'<path class="reference" d="M{x_of(reference.x):.1f} {plot.top}V{plot.base}"/>'
        f'<text class="note" x="{x_of(reference.x) - 6:.1f}" y="{plot.top + 10}"'
        f' text-anchor="end">{text(reference.name)}</text>'
    )
    drawn = [(s, p) for s, p in enumerate(points) if math.isfinite(p.y)]
    places = [(x_of(p.x), y_of(p.y)) for _, p in drawn]
    parts.append(_names(plot, [p.name for _, p in drawn], places))
    for (series, p), (x, y) in zip(drawn, places, strict=True):
        low, high = y_of(p.low), y_of(p.high)
        parts.append(
            f'<path class="line c{series % SERIES}" d="M{x:.1f} {low:.1f}V{high:.1f}'
            f'm-4 0h8M{x - 4:.1f} {low:.1f}h8"/>{marker(series, x, y, 4.5)}'
        )
    label = f"{y_title} against {x_title}, one point a scheme, with intervals"
    return plot.svg("".join(parts), label, x_title, y_title)


def _names(plot: Plot, names: Sequence[str], places: Sequence[tuple[float, float]]) -> str:
    """Names in a column beside all points, on the side with more room, each with a thin line."""
    if not places:
        return ""
    first, last = min(x for x, _ in places), max(x for x, _ in places)
    left_side = first - plot.left > plot.width - plot.right - last
    column = first - 26 if left_side else last + 26
    room = column - plot.left if left_side else plot.width - column
    letters = max(8, int(room / LETTER))
    # From the top down, each at least a line below the last; then all up again if out of the plot
    order = sorted(range(len(names)), key=lambda i: places[i][1])
    heights: list[float] = []
    for i in order:
        heights.append(max(places[i][1], heights[-1] + 15 if heights else plot.top + 8))
    over = max(0.0, heights[-1] - (plot.base - 6))
    parts = []
    for i, height in zip(order, heights, strict=True):
        (x, y), to = places[i], height - over
        name = visible(names[i])
        name = name if len(name) <= letters else f"{name[: letters - 1]}…"
        out = -1 if left_side else 1
        parts.append(
            f'<path class="leader" d="M{x + 7 * out:.1f} {y:.1f}L{column - 12 * out:.1f} {to:.1f}'
            f'H{column - 4 * out:.1f}"/>'
            f'<text class="called over" x="{column:.1f}" y="{to + 4:.1f}"'
            f' text-anchor="{"end" if left_side else "start"}">{text(name)}</text>'
        )
    return "".join(parts)


def lines(
    series: Sequence[Sequence[tuple[float, float]]],
    *,
    width: int,
    height: int,
    x_title: str,
    y_title: str,
    write_x: Write = lambda x: f"{x:g}",
    write_y: Write,
    bounds: tuple[float, float, float, float],
    levels: Sequence[tuple[str, float, str]] = (),
    marks: bool = False,
    first: int = 0,
    label: str,
) -> str:
    """Series of (x, y) as lines, where a y that is not finite is a gap.

    Args:
        series: points in the order of x.
        width: in CSS pixels.
        height: in CSS pixels.
        x_title: what x is.
        y_title: what y is.
        write_x: an x for people.
        write_y: a y for people.
        bounds: left, right, bottom, top.
        levels: class, y and name of lines across.
        marks: whether points are marked.
        first: colour of the first series.
        label: the figure in a sentence.
    """
    left, right, bottom, top = bounds
    plot = Plot(width=width, height=height, left=86, right=16, top=14, bottom=46)

    def x_of(x: float) -> float:
        return plot.left + (x - left) / ((right - left) or 1) * plot.inner_width

    def y_of(y: float) -> float:
        return plot.top + (top - y) / ((top - bottom) or 1) * plot.inner_height

    parts = [plot.y_tick(y_of(y), write_y(y), grid=True) for y in ticks(bottom, top, 4)]
    parts += [plot.x_tick(x_of(x), write_x(x)) for x in ticks(left, right, width // 80)]
    for kind, y, _ in levels:
        parts.append(f'<path class="{kind}" d="M{plot.left} {y_of(y):.1f}h{plot.inner_width}"/>')
    for index, points in enumerate(series, first):
        path, pen = [], "M"
        for x, y in points:
            if math.isfinite(y):
                path.append(f"{pen}{x_of(x):.1f} {y_of(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        parts.append(f'<path class="line c{index % SERIES}" d="{"".join(path)}"/>')
        if marks:
            parts += [marker(index, x_of(x), y_of(y), 3) for x, y in points if math.isfinite(y)]
    # The lowest level's name below its line, the others' above: levels are close to each other
    lowest = min((y for _, y, _ in levels), default=0.0)
    for _, y, name in levels:
        under = y == lowest and len(levels) > 1
        parts.append(
            f'<text class="note over" x="{plot.left + 8}"'
            f' y="{y_of(y) + (13 if under else -5):.1f}">{text(name)}</text>'
        )
    return plot.svg("".join(parts), label, x_title, y_title)


def _power(decade: int) -> str:
    return number(10.0**decade, 1).rpartition("×\u00a0")[2]
