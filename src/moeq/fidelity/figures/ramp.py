"""The ramp of heat maps, as style: from near the paper to far from it, in light and in dark.

Lightness is monotone along both, so that they read without colour vision and in grey.
"""

from __future__ import annotations

_LIGHT = ("f6f1dc", "cfe0bb", "7dbfb2", "3b8fae", "2b5c98", "1c2a5e")
_DARK = ("222c40", "214a78", "2b7f9e", "58b3a4", "b5d9a8", "fbf5cf")


def ramp_rules(steps: int) -> str:
    """CSS rules for the classes r0 to r{steps - 1}."""
    return (
        _rules(_LIGHT, steps)
        + "@media screen and (prefers-color-scheme: dark) {\n"
        + _rules(_DARK, steps)
        + "}\n"
    )


def _rules(anchors: tuple[str, ...], steps: int) -> str:
    return "".join(
        f"svg .r{i} {{ fill: #{_between(anchors, i / (steps - 1))}; }}\n" for i in range(steps)
    )


def _between(anchors: tuple[str, ...], share: float) -> str:
    place = share * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    weight = place - index
    return "".join(
        f"{round((1 - weight) * int(a, 16) + weight * int(b, 16)):02x}"
        for a, b in zip(_channels(anchors[index]), _channels(anchors[index + 1]), strict=True)
    )


def _channels(colour: str) -> tuple[str, str, str]:
    return colour[:2], colour[2:4], colour[4:]
