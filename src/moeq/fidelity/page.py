"""What `moeq eval` measured, as one HTML file that needs nothing else.

`render` is a pure function of the result that `moeq eval --json` prints. Numbers and figures are
static (no script runs, and the page's own policy forbids everything that is not in it), so that a
report can be mailed, printed and kept. What has no data has no section. The result itself is in
the page as a block of JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from moeq.fidelity import charts
from moeq.fidelity.ramp import ramp_rules
from moeq.fidelity.words import (
    agreement,
    change,
    day,
    interval,
    number,
    percent,
    perplexity,
    round_percent,
    share_of_bytes,
    text,
)
from moeq.report import size

Result = dict[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_OUTLIERS = 24
"""More are in the data."""

_UNSET: tuple[Any, ...] = (None, [], {})

_TIMELINE = 400
"""Points of a load that a figure shows."""


def render(result: Result) -> str:
    """The report.

    Args:
        result: as `moeq eval --json` prints it. Every interval is {"value", "low", "high"}.

    Returns:
        an HTML document.
    """
    title = f"Fidelity of {result['model']}"
    sections = (
        _head(result), _verdicts(result), _summary(result), _cost(result), _errors(result),
        _usage(result), _routers(result), _outliers(result), _loads(result), _kept(result),
        _measured(result),
    )  # fmt: skip
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}{ramp_rules(charts.STEPS)}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(sections)}</main>\n"
        f'<script type="application/json" id="result">{_embedded(result)}</script>\n'
        "</body>\n</html>\n"
    )


def _head(result: Result) -> str:
    source = result["text"]
    return (
        f"<header><h1>Fidelity of {text(result['model'])}</h1>\n"
        f'<p class="byline">Quantized models against bf16 on {source["tokens"]:,} tokens:'
        f" {text(source['source'])}. <span>{text(day(result['date']))}.</span></p></header>\n"
    )


def _verdicts(result: Result) -> str:
    """A sentence for each scheme."""
    items = []
    for index, scheme in enumerate(result["schemes"]):
        parts = [share_of_bytes(scheme["bytes"] / result["reference"]["bytes"])]
        if kl := scheme.get("kl"):
            mean = kl["mean"]
            sentence = (
                f"mean KL {number(mean['value'])} ({number(mean['low'])} to {number(mean['high'])})"
            )
            floor = _dig(result, "noise_floor.kl.mean.value") or 0
            if floor > 0:
                times = mean["value"] / floor
                sentence += (
                    f", {number(times, 2)} times the noise floor"
                    if times > 1
                    else ", within the noise floor"
                )
            parts.append(sentence)
        if same := scheme.get("top1_agreement"):
            parts.append(f"{agreement(same['value'])} of next tokens the same")
        if ratio := scheme.get("perplexity_ratio"):
            parts.append(f"perplexity\u00a0{change(ratio['value'])}")
        covered = scheme.get("coverage", 1.0)
        if covered < 1:
            parts.append(f"only {agreement(covered)} of expert weights are quantized")
        items.append(
            f'<li>{charts.key_mark(index)}<span class="name-of">{text(scheme["scheme"])}</span>:'
            f" {'; '.join(parts)}.</li>\n"
        )
    return f'<ul class="verdicts">\n{"".join(items)}</ul>\n'


# Group, heading, where in a row, how it is written. Rows are bf16, the noise floor, schemes.
_COLUMNS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("Size", "weights", "bytes", size),
    ("Size", "experts", "expert_bytes", size),
    ("KL divergence from bf16, nats", "mean", "kl.mean", number),
    ("KL divergence from bf16, nats", "median", "kl.median", number),
    ("KL divergence from bf16, nats", "p99", "kl.p99", number),
    ("KL divergence from bf16, nats", "max", "kl.max", number),
    ("Same choice as bf16", "next token", "top1_agreement", agreement),
    ("Same choice as bf16", "experts", "router_agreement", agreement),
    ("Perplexity", "value", "perplexity", perplexity),
    ("Perplexity", "change", "perplexity_ratio", change),
    ("", "tokens/s", "tokens_per_second", number),
)


def _summary(result: Result) -> str:
    reference, floor = result["reference"], result.get("noise_floor")
    rows = [("bf16", reference, "")]
    if floor:
        rows.append(("noise floor", floor, ""))
    rows += [(s["scheme"], s, charts.key_mark(i)) for i, s in enumerate(result["schemes"])]
    columns = [c for c in _COLUMNS if any(_dig(row, c[2]) is not None for _, row, _ in rows)]
    groups = Counter(group for group, *_ in columns)
    head = "".join(
        f'<th colspan="{n}" scope="colgroup"><span>{text(group)}</span></th>'
        if group
        else "<th></th>"
        for group, n in groups.items()
    )
    names = "".join(f'<th class="n" scope="col">{text(name)}</th>' for _, name, *_ in columns)
    body = []
    for place, (name, row, mark) in enumerate(rows):
        cells = "".join(_cell(row, path, write, reference) for _, _, path, write in columns)
        kind = ' class="first"' if place == len(rows) - len(result["schemes"]) else ""
        body.append(f'<tr{kind}><th scope="row">{mark}{_breakable(name)}</th>{cells}</tr>\n')
    return (
        '<h2>Summary</h2>\n<div class="wide"><table id="summary">\n'
        f'<thead><tr class="group"><th></th>{head}</tr>\n<tr><th scope="col">Scheme</th>{names}'
        f"</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
        '<p class="caption"><b>Table 1.</b> Small print is the share of bf16’s bytes, and elsewhere'
        " a 95 % bootstrap interval. KL divergence is that of the next token’s distribution from"
        f" bf16’s, over {result['text']['scored']:,} positions. Same choice: how often the most"
        " likely next token is bf16’s, and how many of the experts that routers choose are."
        + (
            " The noise floor is bf16 against itself, computed in another order: below it, no"
            " scheme can be told from bf16.</p>\n"
            if floor
            else "</p>\n"
        )
    )


def _cell(row: Result, path: str, write: Callable[[Any], str], reference: Result) -> str:
    value = _dig(row, path)
    if value is None:
        return "<td></td>"
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
        return (
            f'<td class="n" data-value="{value["value"]!r}" data-low="{low!r}"'
            f' data-high="{high!r}">{write(value["value"])}'
            f"<small>{interval(low, high, write)}</small></td>"
        )
    below = ""
    if path.endswith("bytes") and row is not reference and reference.get(path):
        share = value / reference[path]
        below = f'<small data-value="{share!r}">{percent(share)}</small>'
    return f'<td class="n" data-value="{value!r}">{write(value)}{below}</td>'


def _cost(result: Result) -> str:
    schemes = [s for s in result["schemes"] if s.get("kl")]
    if not schemes:
        return ""
    points = [_point(s["scheme"], s["bytes"], s["kl"]["mean"]) for s in schemes]
    floor = _dig(result, "noise_floor.kl.mean")
    figure = charts.cost_figure(
        points,
        floor=_point("bf16", result["reference"]["bytes"], floor) if floor else None,
        write_x=_round_size,
        x_title="weights",
        y_title="mean KL divergence, nats",
    )
    return (
        f'<h2>Size against fidelity</h2>\n<figure class="side">{figure}\n'
        f"<figcaption>{_keys(result, kind='keys narrow')}"
        "<b>Figure 1.</b> Mean KL divergence from bf16 (log scale) against the bytes of all"
        " weights, with 95 % intervals. Lower and further left is better."
        + (" The dotted line is the noise floor, shaded its interval." if floor else "")
        + "</figcaption></figure>\n"
    )


def _errors(result: Result) -> str:
    """Where in the model a scheme's error is."""
    parts = []
    for index, scheme in enumerate(result["schemes"]):
        panels = _expert_panels(scheme) + _linear_panels(scheme)
        if panels:
            parts.append(
                f'<figure><p class="small-title">{charts.key_mark(index)}{text(scheme["scheme"])}'
                f"</p>{panels}</figure>\n"
            )
    if not parts:
        return ""
    widest = max(
        (len(layer["weight_error"]) for s in result["schemes"] for layer in s["layers"]), default=0
    )
    return (
        f'<h2>Error by layer</h2>\n{"".join(parts)}<p class="caption"><b>Figure 2.</b> Relative'
        " errors, ‖quantized − bf16‖ / ‖bf16‖, of the weights of each expert and linear layer and"
        " of what each layer puts out. Every map has a scale of its own, because schemes differ by"
        f" more than layers do.{_binning(widest)}</p>\n"
    )


def _expert_panels(scheme: Result) -> str:
    layers = [x for x in scheme.get("layers") or () if x["kind"] == "moe" and x["weight_error"]]
    if not layers:
        return ""
    labels = _short([layer["name"] for layer in layers])
    weights = charts.heat_map(
        [(n, _numbers(layer["weight_error"])) for n, layer in zip(labels, layers, strict=True)],
        title="Experts: weights",
        write=percent,
    )
    outputs = charts.bars(
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
        return charts.heat_map(
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


def _usage(result: Result) -> str:
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
        f"{charts.heat_map(rows, title='Share of tokens', write=percent)}\n<figcaption>"
        "<b>Figure 3.</b> Share of the text’s tokens that the bf16 model routes to an expert;"
        f" were all used alike, each would get {percent(even)}. "
        + (
            f"{unused:,} of {count:,} experts got no token, and the text says nothing about them."
            if unused
            else f"Each of the {count:,} experts got some."
        )
        + f"{_binning(widest)}</figcaption></figure>\n"
    )


def _routers(result: Result) -> str:
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
    floor = _dig(result, "noise_floor.router_agreement.value")
    least = min([value for *_, value in known] + ([] if floor is None else [floor]))
    figure = charts.lines(
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
        "<b>Figure 4.</b> How many of the experts that a router chooses are those that"
        " it chooses in bf16. Routers are not quantized: what differs is what reaches them."
        + (" The dotted line is the noise floor of all layers." if floor is not None else "")
        + "</figcaption></figure>\n"
    )


def _outliers(result: Result) -> str:
    found = [(s["scheme"], o) for s in result["schemes"] for o in s.get("outliers") or ()]
    if not result["schemes"] or not any("outliers" in s for s in result["schemes"]):
        return ""
    if not found:
        return "<h2>Outliers</h2>\n<p>No layer and no expert stands out.</p>\n"
    rows = []
    for place, (scheme, o) in enumerate(found[:_OUTLIERS]):
        write = agreement if "agreement" in o["what"] else percent
        expert = "" if o.get("expert") is None else o["expert"]
        again = place > 0 and found[place - 1][0] == scheme
        rows.append(
            f"<tr{'' if again or not place else ' class=first'}>"
            f'<th scope="row">{"" if again else _breakable(scheme)}</th>'
            f"<td>{_breakable(o['layer'])}</td>"
            f'<td class="n">{text(expert)}</td><td>{text(o["what"])}</td>'
            f'<td class="n" data-value="{o["value"]!r}">{write(o["value"])}</td>'
            f'<td class="n" data-value="{o["typical"]!r}">{write(o["typical"])}</td></tr>\n'
        )
    rest = len(found) - len(rows)
    return (
        '<h2>Outliers</h2>\n<div class="wide"><table id="outliers">\n<thead><tr>'
        '<th scope="col">Scheme</th><th scope="col">Layer</th><th class="n" scope="col">Expert</th>'
        '<th scope="col">What</th><th class="n" scope="col">Value</th>'
        '<th class="n" scope="col">Typical</th></tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
        '<p class="caption"><b>Table 2.</b> What stands out from its like, and their median.'
        + (f" {rest:,} more are in the data of this page." if rest else "")
        + "</p>\n"
    )


def _loads(result: Result) -> str:
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
        figure = charts.lines(
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
            f'<div class="load"><p class="small-title">{charts.key_mark(index)}{_breakable(scheme)}'
            f'</p>{figure}<p class="small-note">{measured}{size(load["planned_peak_bytes"])}'
            f" planned, {size(load['final_bytes'])} final; {number(load['seconds'])} s</p></div>"
        )
    return (
        f'<h2>Memory while loading</h2>\n<figure><div class="panels">{"".join(panels)}</div>\n'
        "<figcaption><b>Figure 5.</b> Memory that loading takes, over time. Dashed: the peak that"
        " was planned before the first byte was read. Dotted: the final model. All panels share"
        " their axes.</figcaption></figure>\n"
    )


def _kept(result: Result) -> str:
    """What stays unquantized and why; once for schemes that agree."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for scheme in result["schemes"]:
        if scheme.get("kept"):
            alike.setdefault(tuple(scheme["kept"].items()), []).append(scheme["scheme"])
    if not alike:
        return ""
    parts = []
    for kept, schemes in alike.items():
        # One row for the same layer of every block: its number is a star
        groups = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), rule) for name, rule in kept)
        rows = "".join(
            f'<tr><td><code>{_breakable(name)}</code></td><td class="n">{n:,}</td>'
            f"<td>{text(rule)}</td></tr>\n"
            for (name, rule), n in groups.items()
        )
        parts.append(
            f"<details><summary>{len(kept):,} layer{'s' if len(kept) > 1 else ''} under"
            f" {text(', '.join(schemes))}</summary>\n"
            '<div class="wide"><table><thead><tr><th scope="col">Layer</th>'
            '<th class="n" scope="col">How many</th><th scope="col">Why</th></tr></thead>\n'
            f"<tbody>\n{rows}</tbody></table></div></details>\n"
        )
    return f"<h2>What stays unquantized</h2>\n{''.join(parts)}"


def _measured(result: Result) -> str:
    source, peak = result["text"], result.get("peak_bytes")
    versions = {"moeq": result["moeq"], **result["versions"]}
    entries = [
        ("Command", f"<code>{text(result['command'])}</code>"),
        ("Versions", text(", ".join(f"{name} {version}" for name, version in versions.items()))),
        ("Device", text(result["device"])),
        (
            "Text",
            f"{text(source['source'])}; {source['tokens']:,} tokens in windows of"
            f" {source['window']:,}, {source['scored']:,} of them scored",
        ),
        ("Time", f"{number(result['seconds'])} s"),
    ]
    if peak is not None:
        entries.append(("Peak memory", size(peak)))
    for scheme in result["schemes"]:
        # Defaults say nothing, and neither does a scheme that is all of its recipe
        recipe = {k: v for k, v in (scheme.get("quantization") or {}).items() if v not in _UNSET}
        if len(recipe) > 1:
            entries.append((text(scheme["scheme"]), f"<code>{text(json.dumps(recipe))}</code>"))
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in entries)
    return (
        f"<h2>How this was measured</h2>\n<dl>\n{items}</dl>\n"
        '<p class="caption">The numbers behind this page are in it, as JSON: the element'
        " <code>#result</code> at the end of its source.</p>\n"
    )


def _embedded(result: Result) -> str:
    """JSON that no string in it can end; ASCII, and NaN, which JSON lacks, as null."""
    plain = json.dumps(_finite(result), allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keys(result: Result, kind: str = "keys") -> str:
    items = "".join(
        f"<li>{charts.key_mark(index)}{_breakable(scheme['scheme'])}</li>"
        for index, scheme in enumerate(result["schemes"])
    )
    return f'<ul class="{kind}">{items}</ul>'


def _dig(row: Result, path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = None if value is None else value.get(key)
    return value


def _point(name: str, nbytes: int, found: Result) -> charts.Point:
    return charts.Point(name, nbytes, found["value"], found["low"], found["high"])


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
    each = math.ceil(columns / charts.MAX_COLUMNS)
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


def _breakable(name: str) -> str:
    """A long name may go on in a new line after each _ and dot."""
    return re.sub(r"(?<=[_.])(?=[^_.<])", "<wbr>", text(name))
