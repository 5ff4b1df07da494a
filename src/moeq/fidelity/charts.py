"""The figures of a report's page, as inline SVG: static, sized in CSS pixels, coloured by classes.

Colours are left to the page's style, where light, dark and print differ: `c0` to `c7` tell series
apart (each has a marker of its own too), `r0` to `r23` are the steps of the heat maps' ramp, from
near the paper to far from it. Cells of a heat map that share a step are one path: 64 layers of 128
columns take 100 kB and not 500.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeq.fidelity.words import number, percent, round_percent, text, visible

Write = Callable[[float], str]

SERIES = 8
"""Series get colours in turn, as many as eyes tell apart."""

STEPS = 24
MAX_COLUMNS = 128
"""Heat maps with more columns show the largest value of several."""

_LETTER = 7.5
"""Widths of text are guessed: of wide fonts, an average letter of 11.5 px takes this."""


@dataclass(frozen=True)
class Point:
    """A scheme in `cost_figure`: x, and y with its interval."""

    name: str
    x: float
    y: float
    low: float
    high: float


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


def cost_figure(
    points: Sequence[Point], *, floor: Point | None, write_x: Write, x_title: str, y_title: str
) -> str:
    """y on a log axis against x, with intervals; `floor` is a band across, its x is bf16's."""
    known = [p for p in (*points, *([floor] if floor else [])) if 0 < p.y < math.inf]
    bounds = [v for p in known for v in (p.y, p.low, p.high) if 0 < v < math.inf]
    top = math.ceil(math.log10(max(bounds, default=1.0)) + 0.05)
    # An interval that reaches far down is cut, so that it does not set the scale
    least = min((p.y for p in known), default=0.1)
    bottom = math.floor(max(math.log10(min(bounds, default=0.1)), math.log10(least) - 1) - 0.05)
    plot = _Plot(width=600, height=350, left=82, right=16, top=12, bottom=46)
    right = 1.06 * max([p.x for p in points] + ([floor.x] if floor else []))

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
    parts += [plot.x_tick(x_of(x), write_x(x)) for x in _ticks(0, right, 6)]
    if floor and 0 < floor.y < math.inf:
        y, high, low = y_of(floor.y), y_of(floor.high), y_of(floor.low)
        end = plot.left + plot.inner_width
        parts.append(
            f'<rect class="band" x="{plot.left}" y="{high:.1f}" width="{plot.inner_width}"'
            f' height="{max(low - high, 0.5):.1f}"/>'
            f'<path class="floor" d="M{plot.left} {y:.1f}H{end}"/>'
            f'<text class="note" x="{plot.left + 8}" y="{high - 5:.1f}">noise floor</text>'
        )
    if floor:
        parts.append(
            f'<path class="reference" d="M{x_of(floor.x):.1f} {plot.top}V{plot.base}"/>'
            f'<text class="note" x="{x_of(floor.x) - 6:.1f}" y="{plot.top + 10}"'
            ' text-anchor="end">bf16</text>'
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


def _names(plot: _Plot, names: Sequence[str], places: Sequence[tuple[float, float]]) -> str:
    """Names in a column beside all points, on the side with more room, each with a thin line."""
    if not places:
        return ""
    first, last = min(x for x, _ in places), max(x for x, _ in places)
    left_side = first - plot.left > plot.width - plot.right - last
    column = first - 26 if left_side else last + 26
    room = column - plot.left if left_side else plot.width - column
    letters = max(8, int(room / _LETTER))
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


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    write: Write,
    column: str = "expert",
    names: Sequence[str] = (),
) -> str:
    """Values by row and column, with a legend in numbers. Not finite is left blank.

    Args:
        rows: label and values, one a column; rows may differ in length.
        title: what the values are.
        write: a value for people.
        column: what a column is.
        names: of columns; without, and where they are too long for an axis, they are numbered.
    """
    columns = max(len(values) for _, values in rows)
    each = math.ceil(columns / MAX_COLUMNS)
    binned = [[_largest(v[i : i + each]) for i in range(0, len(v), each)] for _, v in rows]
    shown = math.ceil(columns / each)
    finite = [v for _, values in rows for v in values if math.isfinite(v)]
    high, least = max(finite, default=0.0), min(finite, default=0.0)
    # Of what is drawn, where a column is the largest of several. And differences of less than a
    # twentieth are not to look like structure.
    low = min((v for bins in binned for v in bins if math.isfinite(v)), default=0.0)
    margin = max(0.0, 0.05 * abs(high) - (high - low)) / 2
    start, span = low - margin, (high - low + 2 * margin) or 1.0
    w, h = max(3, min(36, 512 // shown)), row_height(len(rows))
    left, inner, below = _label_width(rows), w * shown, 30 + h * len(rows)
    gap = 1 if w >= 8 and h >= 8 else 0
    cells: list[list[str]] = [[] for _ in range(STEPS)]
    for row, bins in enumerate(binned):
        steps = [
            min(STEPS - 1, int((v - start) / span * STEPS)) if math.isfinite(v) else -1
            for v in bins
        ]
        first = 0
        for i in range(1, len(steps) + 1):
            # Neighbours of one step are one rectangle, unless a gap is to part them
            if i == len(steps) or steps[i] != steps[first] or gap:
                if steps[first] >= 0:
                    wide = w * (i - first) - gap
                    cells[steps[first]].append(
                        f"M{left + w * first} {30 + h * row}h{wide}v{h - gap}h{-wide}z"
                    )
                first = i
    parts = [f'<path class="r{i}" d="{"".join(d)}"/>' for i, d in enumerate(cells) if d]
    parts.append(_row_labels([label for label, _ in rows], left, h))
    for row, (label, values) in enumerate(rows):
        parts.append(
            f'<rect class="hover" x="{left}" y="{30 + h * row}" width="{inner}" height="{h}">'
            f"<title>{text(_describe(label, values, column, names, write))}</title></rect>"
        )
    numbered = not names or max(map(len, names)) > 4
    every = _every(34, w / each)
    parts += [
        f'<text class="tick" text-anchor="middle" x="{left + w * (i // each + 0.5):.1f}"'
        f' y="{below + 13}">{text(i if numbered else names[i])}</text>'
        for i in range(0, columns, every)
    ]
    parts.append(_axis_title(left + inner / 2, below + 29, column))
    end = left + max(inner, 340)
    parts.append(_legend(left, end, title, write(start), write(start + span)))
    peak = max(((_largest(v), n) for n, v in rows if finite), default=(0.0, ""))
    label = (
        f"Heat map of {title}: {len(rows)} rows by {columns}, from {write(least)} to {write(high)},"
        f" largest in row {peak[1]}"
    )
    return _svg(end + 8, below + 34, label, "".join(parts))


def bars(rows: Sequence[tuple[str, float]], *, title: str) -> str:
    """A bar a row, of shares, at the rows of the `heat_map` beside it."""
    h, left, inner = row_height(len(rows)), _label_width(rows), 210
    finite = [v for _, v in rows if math.isfinite(v)]
    right = max(finite, default=0.0) or 1.0
    ticks = _ticks(0, right, 3)
    below = 30 + h * len(rows)
    parts = [
        f'<path class="grid" d="M{left + x / right * inner:.1f} 28V{below}"/>'
        f'<text class="tick" text-anchor="middle" x="{left + x / right * inner:.1f}"'
        f' y="{below + 13}">{round_percent(x)}</text>'
        for x in ticks
    ]
    thick = max(2, round(0.62 * h))
    for row, (label, value) in enumerate(rows):
        if math.isfinite(value):
            parts.append(
                f'<rect class="bar" x="{left}" y="{30 + h * row + (h - thick) / 2:.1f}"'
                f' width="{max(value, 0) / right * inner:.1f}" height="{thick}">'
                f"<title>{text(label)}: {percent(value)}</title></rect>"
            )
            if h >= 14:
                parts.append(
                    f'<text class="tick over" x="{left + max(value, 0) / right * inner + 5:.1f}"'
                    f' y="{30 + h * (row + 0.5) + 4:.1f}">{percent(value)}</text>'
                )
    parts.append(_row_labels([label for label, _ in rows], left, h))
    parts.append(f'<text class="title" x="{left}" y="16">{text(title)}</text>')
    label = f"Bars of {title} by layer, the largest {percent(max(finite, default=0.0))}"
    return _svg(left + inner + 58, below + 34, label, "".join(parts))


def row_height(rows: int) -> int:
    """Of heat maps and of the bars beside them."""
    return max(6, min(20, 420 // rows))


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
    plot = _Plot(width=width, height=height, left=82, right=16, top=14, bottom=46)

    def x_of(x: float) -> float:
        return plot.left + (x - left) / ((right - left) or 1) * plot.inner_width

    def y_of(y: float) -> float:
        return plot.top + (top - y) / ((top - bottom) or 1) * plot.inner_height

    parts = [plot.y_tick(y_of(y), write_y(y), grid=True) for y in _ticks(bottom, top, 4)]
    parts += [plot.x_tick(x_of(x), write_x(x)) for x in _ticks(left, right, width // 80)]
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


@dataclass(frozen=True)
class _Plot:
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
            + _axis_title(self.left + self.inner_width / 2, self.height - 8, x_title)
            + f'<text class="name" text-anchor="middle" transform="translate(17 {middle:.0f})'
            f' rotate(-90)">{text(y_title)}</text>'
        )
        return _svg(self.width, self.height, label, axes + body)


def _svg(width: float, height: float, label: str, body: str) -> str:
    # Those that narrow screens shrink get larger letters there
    kind = ' class="large"' if width > 400 else ""
    w, h = f"{width:.0f}", f"{height:.0f}"
    return (
        f'<svg{kind} viewBox="0 0 {w} {h}" width="{w}" height="{h}"'
        f' role="img" aria-label="{text(label)}">{body}</svg>'
    )


def _axis_title(x: float, y: float, title: str) -> str:
    return f'<text class="name" text-anchor="middle" x="{x:.1f}" y="{y:.0f}">{text(title)}</text>'


def _legend(left: float, right: float, title: str, low: str, high: str) -> str:
    bar, step = 72, 3
    # Room for the larger letters of narrow screens
    end = right - 8 * len(high) - 6
    start = end - bar
    swatches = "".join(
        f'<rect class="r{i}" x="{start + i * step:.1f}" y="8" width="{step}" height="9"/>'
        for i in range(STEPS)
    )
    return (
        f'<text class="title" x="{left}" y="16">{text(title)}</text>{swatches}'
        f'<text class="tick" text-anchor="end" x="{start - 5:.1f}" y="16">{text(low)}</text>'
        f'<text class="tick" x="{end + 5:.1f}" y="16">{text(high)}</text>'
    )


def _label_width(rows: Sequence[tuple[str, object]]) -> int:
    return 14 + round(_LETTER * max(len(_cut(label)) for label, _ in rows))


def _row_labels(labels: Sequence[str], left: int, height: int) -> str:
    every = _every(15, height)
    return "".join(
        f'<text class="tick" text-anchor="end" x="{left - 6}"'
        f' y="{30 + height * (row + 0.5) + 4:.1f}">{text(_cut(label))}</text>'
        for row, label in enumerate(labels)
        if row % every == 0
    )


def _cut(label: str) -> str:
    """The end of a long name, which differs where its start may not."""
    shown = visible(label)
    return shown if len(shown) <= 24 else f"…{shown[-23:]}"


def _every(room: float, each: float) -> int:
    """How many items of `each` pixels go to a label that takes `room`, as a round number."""
    wanted = math.ceil(room / each)
    decade = 1
    while 10 * decade <= wanted:
        decade *= 10
    return next(m * decade for m in (1, 2, 5, 10) if m * decade >= wanted)


def _describe(
    label: str, values: Sequence[float], column: str, names: Sequence[str], write: Write
) -> str:
    known = [(v, i) for i, v in enumerate(values) if math.isfinite(v)]
    if not known:
        return f"{label}: nothing known"
    value, index = max(known)
    where = names[index] if names else index
    return f"{label}: {write(min(known)[0])} to {write(value)}, largest in {column} {where}"


def _largest(values: Sequence[float]) -> float:
    return max((v for v in values if math.isfinite(v)), default=math.nan)


def _power(decade: int) -> str:
    return number(10.0**decade, 1).rpartition("× ")[2]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    span = (high - low) or 1.0
    raw = span / max(count, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= 0.999 * raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
