"""Heat maps by layer and column, and bars by layer beside them.

The ramp's steps are the classes `r0` to `r23`, see `ramp`. Cells that share a step are one path:
64 layers of 128 columns take 100 kB and not 500.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeq.fidelity.figures.svg import (
    LARGE_LETTER,
    Write,
    axis_title,
    cut,
    every,
    figure,
    ticks,
)
from moeq.fidelity.words import percent, round_percent, text

STEPS = 24
"""Of the ramp."""

MAX_COLUMNS = 128
"""Maps with more columns show the largest value of several."""

_TOP = 30
"""Above the first row: title and legend."""


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
    known = [(n, [v for v in values if math.isfinite(v)]) for n, values in rows]
    finite = [v for _, values in known for v in values]
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
                        f"M{left + w * first} {_TOP + h * row}h{wide}v{h - gap}h{-wide}z"
                    )
                first = i
    parts = [f'<path class="r{i}" d="{"".join(d)}"/>' for i, d in enumerate(cells) if d]
    parts.append(_row_labels([label for label, _ in rows], left, h))
    for row, (label, values) in enumerate(rows):
        parts.append(
            f'<rect class="hover" x="{left}" y="{_TOP + h * row}" width="{inner}" height="{h}">'
            f"<title>{text(_describe(label, values, column, names, write))}</title></rect>"
        )
    numbered = not names or max(map(len, names)) > 4
    step = every(34, w / each)
    parts += [
        f'<text class="tick" text-anchor="middle" x="{left + w * (i // each + 0.5):.1f}"'
        f' y="{below + 13}">{text(i if numbered else names[i])}</text>'
        for i in range(0, columns, step)
    ]
    parts.append(axis_title(left + inner / 2, below + 29, column))
    end = left + max(inner, 340)
    parts.append(_legend(left, end, title, write(start), write(high + margin)))
    peak = max(((max(v), n) for n, v in known if v), default=(0.0, ""))
    label = (
        f"Heat map of {title}: {len(rows)} rows by {columns}, from {write(least)} to {write(high)},"
        f" largest in row {peak[1]}"
    )
    return figure(end + 8, below + 36, label, "".join(parts))


def bars(rows: Sequence[tuple[str, float]], *, title: str) -> str:
    """A bar a row, of shares, at the rows of the `heat_map` beside it."""
    h, left, inner = row_height(len(rows)), _label_width(rows), 210
    finite = [v for _, v in rows if math.isfinite(v)]
    right = max(finite, default=0.0) or 1.0
    below = _TOP + h * len(rows)
    parts = [
        f'<path class="grid" d="M{left + x / right * inner:.1f} 28V{below}"/>'
        f'<text class="tick" text-anchor="middle" x="{left + x / right * inner:.1f}"'
        f' y="{below + 13}">{round_percent(x)}</text>'
        for x in ticks(0, right, 3)
    ]
    thick = max(2, round(0.62 * h))
    for row, (label, value) in enumerate(rows):
        if math.isfinite(value):
            parts.append(
                f'<rect class="bar" x="{left}" y="{_TOP + h * row + (h - thick) / 2:.1f}"'
                f' width="{max(value, 0) / right * inner:.1f}" height="{thick}">'
                f"<title>{text(label)}: {percent(value)}</title></rect>"
            )
            if h >= 14:
                parts.append(
                    f'<text class="tick over" x="{left + max(value, 0) / right * inner + 5:.1f}"'
                    f' y="{_TOP + h * (row + 0.5) + 4:.1f}">{percent(value)}</text>'
                )
    parts.append(_row_labels([label for label, _ in rows], left, h))
    parts.append(f'<text class="title" x="{left}" y="16">{text(title)}</text>')
    label = f"Bars of {title} by layer, the largest {percent(max(finite, default=0.0))}"
    return figure(left + inner + 72, below + 36, label, "".join(parts))


def row_height(rows: int) -> int:
    """Of heat maps and of the bars beside them."""
    return max(6, min(20, 420 // rows))


def _legend(left: float, right: float, title: str, low: str, high: str) -> str:
    bar, step = 72, 3
    end = right - LARGE_LETTER * len(high) - 6
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
    return 12 + round(LARGE_LETTER * max(len(cut(label)) for label, _ in rows))


def _row_labels(labels: Sequence[str], left: int, height: int) -> str:
    step = every(15, height)
    return "".join(
        f'<text class="tick" text-anchor="end" x="{left - 6}"'
        f' y="{_TOP + height * (row + 0.5) + 4:.1f}">{text(cut(label))}</text>'
        for row, label in enumerate(labels)
        if row % step == 0
    )


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
