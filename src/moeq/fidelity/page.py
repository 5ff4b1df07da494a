"""What `moeq eval` measured, as one HTML file that needs nothing else.

`render` is a pure function of the result that `moeq eval --json` prints. Numbers and figures are
static (no script runs, and the page's own policy forbids everything that is not in it), so that a
report can be mailed, printed and kept. What has no data has no section. The result itself is in
the page as a block of JSON.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from importlib import resources
from typing import Any

from moeq.fidelity import page_figures
from moeq.fidelity.figures.maps import STEPS
from moeq.fidelity.figures.ramp import ramp_rules
from moeq.fidelity.figures.svg import key_mark
from moeq.fidelity.page_result import Result, dig
from moeq.fidelity.result import finite
from moeq.fidelity.words import (
    agreement,
    breakable,
    change,
    day,
    interval,
    number,
    percent,
    perplexity,
    share_of_bytes,
    text,
)
from moeq.report import size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_OUTLIERS = 24
"""More are in the data."""

_UNSET: tuple[Any, ...] = (None, [], {})


def render(result: Result) -> str:
    """The report.

    Args:
        result: as `moeq eval --json` prints it. Every interval is {"value", "low", "high"}.

    Returns:
        an HTML document.
    """
    title = f"Fidelity of {result['model']}"
    sections = (
        _head, _verdicts, _summary, page_figures.cost, page_figures.errors, page_figures.usage,
        page_figures.routers, _outliers, page_figures.loads, _kept, _measured,
    )  # fmt: skip
    body = _numbered("".join(section(result) for section in sections))
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}{ramp_rules(STEPS)}</style>\n"
        f"</head>\n<body>\n<main>\n{body}</main>\n"
        f'<script type="application/json" id="result">{_embedded(result)}</script>\n'
        "</body>\n</html>\n"
    )


def _numbered(body: str) -> str:
    """Figures and tables in the order in which this page has them. Names cannot be tags."""
    counts: Counter[str] = Counter()

    def count(found: re.Match[str]) -> str:
        counts[found[1]] += 1
        return f"{found[0]} {counts[found[1]]}"

    return re.sub("<b>(Figure|Table)", count, body)


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
            floor = dig(result, "noise_floor.kl.mean.value") or 0
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
        if unseen := scheme.get("unseen"):
            parts.append(f"{len(unseen):,} quantized layers that text does not reach are not in it")
        parts += [text(note) for note in scheme.get("notes") or ()]
        items.append(
            f'<li>{key_mark(index)}<span class="name-of">{text(scheme["scheme"])}</span>:'
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
    rows += [(s["scheme"], s, key_mark(i)) for i, s in enumerate(result["schemes"])]
    columns = [c for c in _COLUMNS if any(dig(row, c[2]) is not None for _, row, _ in rows)]
    groups = Counter(group for group, *_ in columns)
    routers = any(path == "router_agreement" for _, _, path, _ in columns)
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
        body.append(f'<tr{kind}><th scope="row">{mark}{breakable(name)}</th>{cells}</tr>\n')
    return (
        '<h2>Summary</h2>\n<div class="wide"><table id="summary">\n'
        f'<thead><tr class="group"><th></th>{head}</tr>\n<tr><th scope="col">Scheme</th>{names}'
        f"</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
        '<p class="caption"><b>Table.</b> Small print is the share of bf16’s bytes, and elsewhere'
        " a 95 % bootstrap interval. KL divergence is that of the next token’s distribution from"
        f" bf16’s, over {result['text']['scored']:,} positions. Same choice: how often the most"
        " likely next token is bf16’s"
        + (", and how many of the experts that routers choose are." if routers else ".")
        + (
            " The noise floor is bf16 against itself, computed in another order: below it, no"
            " scheme can be told from bf16.</p>\n"
            if floor
            else "</p>\n"
        )
    )


def _cell(row: Result, path: str, write: Callable[[Any], str], reference: Result) -> str:
    value = dig(row, path)
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
            f'<th scope="row">{"" if again else breakable(scheme)}</th>'
            f"<td>{breakable(o['layer'])}</td>"
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
        '<p class="caption"><b>Table.</b> What stands out from its like, and their median.'
        + (f" {rest:,} more are in the data of this page." if rest else "")
        + "</p>\n"
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
            f'<tr><td><code>{breakable(name)}</code></td><td class="n">{n:,}</td>'
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
    plain = json.dumps(finite(result), allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
