"""The sections of a report's page that are figures, each from the result and to HTML.

A section without data is an empty string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from moeq.fidelity.figures.curves import Point, cost_figure, lines
from moeq.fidelity.figures.maps import MAX_COLUMNS, bars, heat_map
from moeq.fidelity.figures.svg import key_mark
from moeq.fidelity.page_result import Result, dig
from moeq.fidelity.words import agreement, breakable, number, percent, round_percent, text
from moeq.report import size

_UNKNOWN = {"value": math.nan, "low": math.nan, "high": math.nan}

_TIMELINE = 400
"""Points of a load that a figure shows."""


def cost(result: Result) -> str:
    schemes = [s for s in result["schemes"] if s.get("kl")]
    if not schemes:
        return ""
    points = [_point(s["scheme"], s["bytes"], s["kl"]["mean"]) for s in schemes]
    floor = dig(result, "noise_floor.kl.mean")
    figure = cost_figure(
        points,
        reference=_point("bf16", result["reference"]["bytes"], floor or _UNKNOWN),
        write_x=_round_size,
        x_title="weights",
        y_title="mean KL divergence, nats",
    )
    return (
        f'<h2>Size against fidelity</h2>\n<figure class="side">{figure}\n'
        f"<figcaption>{_keys(result, kind='keys narrow')}"
        "<b>Figure.</b> Mean KL divergence from bf16 (log scale) against the bytes of all"
        " weights, with 95 % intervals. Lower and further left is better."
        + (" The dotted line is the noise floor, shaded its interval." if floor else "")
        + "</figcaption></figure>\n"
    )


def errors(result: Result) -> str:
    """Where in the model a scheme's error is."""
    parts = []
    for index, scheme in enumerate(result["schemes"]):
        panels = _expert_panels(scheme) + _linear_panels(scheme)
        if panels:
            parts.append(
                f'<figure><p class="small-title">{key_mark(index)}{text(scheme["scheme"])}'
                f"</p>{panels}</figure>\n"
            )
    if not parts:
        return ""
    widest = max(
        (len(layer["weight_error"]) for s in result["schemes"] for layer in s["layers"]), default=0
    )
    return (
        f'<h2>Error by layer</h2>\n{"".join(parts)}<p class="caption"><b>Figure.</b> Relative'
        " errors, ‖quantized − bf16‖ / ‖bf16‖, of the weights of each expert and linear layer and"
        " of what each layer puts out. Every map has a scale of its own, because schemes differ by"
        f" more than layers do.{_binning(widest)}</p>\n"
    )


def _expert_panels(scheme: Result) -> str:
    layers = [x for x in scheme.get("layers") or () if x["kind"] == "moe" and x["weight_error"]]
    if not layers:
        return ""
    labels = _short([layer["name"] for layer in layers])
    weights = heat_map(
        [(n, _numbers(layer["weight_error"])) for n, layer in zip(labels, layers, strict=True)],
        title="Experts: weights",
        write=percent,
    )
    outputs = bars(
        list(zip(labels, _numbers(layer["output_error"] for layer in layers), strict=True)),
        title="Experts: output",
    )
    return f'<div class="panels">{weights}{outputs}</div>'


def _linear_panels(scheme: Result) -> str:
    """Linears as a matrix: a row a projection, a column a block of the model."""
    layers = [x for x in scheme.get("layers") or () if x["kind"] == "linear" and x["weight_error"]]
    if not layers:
        return ""
    split = [_block_and_part(layer["name"]) for layer in layers]
    blocks = list(dict.fromkeys(block for block, _ in split))
    parts = list(dict.fromkeys(part for _, part in split))
    last = [part.rpartition(".")[2] for part in parts]
    rows = last if len(set(last)) == len(last) else parts
    columns = _short(blocks)

    def matrix(title: str, values: list[float]) -> str:
        known = dict(zip(split, values, strict=True))
        return heat_map(
            [
                (row, [known.get((block, part), math.nan) for block in blocks])
                for row, part in zip(rows, parts, strict=True)
            ],
            title=title,
            write=percent,
            column="layer",
            names=columns,
        )

    weights = matrix("Linears: weights", _numbers(layer["weight_error"][0] for layer in layers))
    outputs = matrix("Linears: output", _numbers(layer["output_error"] for layer in layers))
    return f'<div class="panels">{weights}{outputs}</div>'


def usage(result: Result) -> str:
    experts = {name: hits for name, hits in (result.get("experts") or {}).items() if hits}
    if not experts:
        return ""
    tokens = result["text"]["tokens"]
    labels = _short(list(experts))
    rows = [
        (label, [n / tokens for n in hits])
        for label, hits in zip(labels, experts.values(), strict=True)
    ]
    unused = sum(n == 0 for hits in experts.values() for n in hits)
    count = sum(map(len, experts.values()))
    even = sum(map(sum, experts.values())) / tokens / count
    widest = max(map(len, experts.values()))
    return (
        '<h2>Use of experts</h2>\n<figure class="side">'
        f"{heat_map(rows, title='Share of tokens', write=percent)}\n<figcaption>"
        "<b>Figure.</b> Share of the text’s tokens that the bf16 model routes to an expert;"
        f" were all used alike, each would get {percent(even)}. "
        + (
            f"{unused:,} of {count:,} experts got no token, and the text says nothing about them."
            if unused
            else f"Each of the {count:,} experts got some."
        )
        + f"{_binning(widest)}</figcaption></figure>\n"
    )


def routers(result: Result) -> str:
    """Lines of routers that choose as bf16's."""
    known = [
        (index, layer["name"], layer["router_agreement"])
        for index, scheme in enumerate(result["schemes"])
        for layer in scheme.get("layers") or ()
        if layer.get("router_agreement") is not None
    ]
    names = list(dict.fromkeys(name for _, name, _ in known))
    if len(names) < 2:
        return ""
    place = {name: i for i, name in enumerate(names)}
    labels = _short(names)
    if max(map(len, labels)) > 4:
        labels = [str(i) for i in range(len(names))]
    series: list[list[tuple[float, float]]] = [[] for _ in result["schemes"]]
    for index, name, value in known:
        series[index].append((place[name], value))
    floor = dig(result, "noise_floor.router_agreement.value")
    least = min([value for *_, value in known] + ([] if floor is None else [floor]))
    figure = lines(
        series,
        width=560,
        height=280,
        x_title="layer",
        y_title="experts chosen as bf16 does",
        write_x=lambda x: labels[int(x)] if x == int(x) else "",
        write_y=round_percent,
        bounds=(0, len(names) - 1, least - 0.05 * (1 - least), 1.0),
        levels=[("floor", floor, "")] if floor is not None else [],
        marks=len(names) <= 32,
        label=f"Router agreement with bf16 by layer, lowest {agreement(least)}",
    )
    return (
        f'<h2>Routers</h2>\n<figure class="side">{figure}\n<figcaption>{_keys(result)}'
        "<b>Figure.</b> How many of the experts that a router chooses are those that"
        " it chooses in bf16. Routers are not quantized: what differs is what reaches them."
        + (" The dotted line is the noise floor of all layers." if floor is not None else "")
        + "</figcaption></figure>\n"
    )


def loads(result: Result) -> str:
    """Memory while each scheme loaded, on the same axes."""
    loads = [
        (index, scheme["scheme"], scheme["load"])
        for index, scheme in enumerate(result["schemes"])
        if scheme.get("load") and scheme["load"]["timeline"]
    ]
    if not loads:
        return ""
    seconds = max(load["timeline"][-1][0] for _, _, load in loads) or 1.0
    top = 1.08 * max(
        max(load["planned_peak_bytes"], max(b for _, b in load["timeline"])) for _, _, load in loads
    )
    panels = []
    for index, scheme, load in loads:
        actual = load.get("actual_peak_bytes")
        measured = "" if actual is None else f"peak {size(actual)}, "
        figure = lines(
            [_thin(load["timeline"])],
            width=336,
            height=230,
            x_title="seconds",
            y_title="memory",
            write_y=_round_size,
            bounds=(0.0, seconds, 0.0, top),
            levels=[
                ("planned", load["planned_peak_bytes"], "planned"),
                ("final", load["final_bytes"], "final"),
            ],
            first=index,
            label=f"Memory over time while {scheme} loads: {measured}planned"
            f" {size(load['planned_peak_bytes'])}, final {size(load['final_bytes'])}",
        )
        panels.append(
            f'<div class="load"><p class="small-title">{key_mark(index)}{breakable(scheme)}'
            f'</p>{figure}<p class="small-note">{measured}{size(load["planned_peak_bytes"])}'
            f" planned, {size(load['final_bytes'])} final; {number(load['seconds'])} s</p></div>"
        )
    return (
        f'<h2>Memory while loading</h2>\n<figure><div class="panels">{"".join(panels)}</div>\n'
        "<figcaption><b>Figure.</b> Memory that loading takes, over time. Dashed: the peak that"
        " was planned before the first byte was read. Dotted: the final model. All panels share"
        " their axes.</figcaption></figure>\n"
    )


def _keys(result: Result, kind: str = "keys") -> str:
    items = "".join(
        f"<li>{key_mark(index)}{breakable(scheme['scheme'])}</li>"
        for index, scheme in enumerate(result["schemes"])
    )
    return f'<ul class="{kind}">{items}</ul>'


def _point(name: str, nbytes: int, found: Result) -> Point:
    return Point(name, nbytes, found["value"], found["low"], found["high"])


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _round_size(nbytes: float) -> str:
    """Of ticks: 5e6 -> '5 MB'."""
    return size(round(nbytes)).replace(".0 ", " ")


def _thin(timeline: list[list[float]]) -> list[tuple[float, float]]:
    """The highest of every few points: a peak is never lost."""
    each = math.ceil(len(timeline) / _TIMELINE)
    pieces = (timeline[i : i + each] for i in range(0, len(timeline), each))
    return [(t, b) for t, b in (max(piece, key=lambda point: point[1]) for piece in pieces)]


def _binning(columns: int) -> str:
    each = math.ceil(columns / MAX_COLUMNS)
    return f" A column is the largest of {each} neighbouring experts." if each > 1 else ""


def _short(names: list[str]) -> list[str]:
    """'model.layers.7.mlp.experts' -> '7', where nothing else tells the names apart."""
    blocks = [_block_and_part(name) for name in names]
    stems = {(block.rpartition(".")[0], part) for block, part in blocks}
    if len(stems) == 1:
        return [block.rpartition(".")[2] for block, _ in blocks]
    return names


def _block_and_part(name: str) -> tuple[str, str]:
    """'model.layers.7.self_attn.q_proj' -> ('model.layers.7', 'self_attn.q_proj')."""
    found = re.match(r"(.*?\.?\d+)(?:\.(.*))?$", name, re.DOTALL)
    return (found[1], found[2] or "") if found else ("", name)
