"""The page as text: what is in it, what is not, and that no name gets to be markup."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from moeq.fidelity import words
from moeq.fidelity.figures.maps import heat_map
from moeq.fidelity.page import render
from tests.fidelity.sample import (
    HOSTILE,
    SCHEMES,
    degenerate,
    hostile,
    linears_only,
    make_result,
    summary_numbers,
)

VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}
# SVG's empty elements are written with a slash, HTML's without
Attributes = dict[str, str | None]


class Reader(HTMLParser):
    """Elements with their attributes, the text inside them, and whether tags balance."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, Attributes]] = []
        self.rows: list[list[tuple[Attributes, str]]] = []
        self.script = ""
        self.text = ""
        self._summary = False
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} says an attribute twice: {names}"
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._summary = found.get("id") == "summary"
        if tag == "tr" and self._summary:
            self.rows.append([])
        if self._summary and self.rows and tag in ("td", "th", "small"):
            self.rows[-1].append((found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is not HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self._summary = False

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.text += data
        if self._summary and self.rows and self.rows[-1] and self.open[-1] in ("td", "th", "small"):
            attributes, before = self.rows[-1][-1]
            self.rows[-1][-1] = attributes, before + data

    def of(self, tag: str) -> list[Attributes]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_summary_has_every_number_as_it_was_measured() -> None:
    result = make_result()
    reader = Reader(render(result))
    body = reader.rows[2:]
    found = [
        [
            float(attributes[key] or "nan")
            for attributes, _ in row
            for key in ("data-value", "data-low", "data-high")
            # Shares of bytes have a number too, below one that was measured
            if key in attributes and attributes.get("class") == "n"
        ]
        for row in body
    ]
    assert found == summary_numbers(result)
    names = [row[0][1] for row in body]
    assert names == ["bf16", "noise floor", *(s["scheme"] for s in result["schemes"])]


def test_summary_reads_as_people_write() -> None:
    result = make_result()
    scheme = result["schemes"][0]
    scheme |= {
        "bytes": 15_950_000,
        "expert_bytes": 12_000_000,
        "kl": {
            "mean": {"value": 0.00041234, "low": 0.000310, "high": 0.00052},
            "median": {"value": 6.9e-7, "low": 6.35e-7, "high": 7.56e-7},
            "p99": {"value": 0.0, "low": 0.0, "high": 0.01},
            "max": {"value": 12.345, "low": 1.0, "high": math.inf},
        },
        "top1_agreement": {"value": 0.9913, "low": 0.99, "high": 0.9999},
        "router_agreement": {"value": 1.0, "low": 1.0, "high": 1.0},
        "perplexity": {"value": 10.43456, "low": 10.2, "high": 10.6},
        "perplexity_ratio": {"value": 0.99999, "low": 0.9990, "high": 1.0012},
        "tokens_per_second": 6321.5,
    }
    row = Reader(render(result)).rows[4]
    assert [text.replace("\u00a0", " ") for _, text in row] == [
        "int8_per_channel_weight_only",
        "15.9 MB", "57.9 %", "12.0 MB", "50.8 %",
        "0.000412", "0.000310–0.000520",
        "6.90 × 10⁻⁷", "(6.35–7.56) × 10⁻⁷",
        "0", "0–0.0100",
        "12.3", "1.00–not finite",
        "99.1 %", "99.00–99.99 %",
        "100 %", "100–100 %",
        "10.435", "10.200–10.600",
        "0.00 %", "−0.10 to +0.12 %",
        "6,322",
    ]  # fmt: skip


def test_verdict_is_a_sentence() -> None:
    result = make_result()
    result["reference"]["bytes"] = 2 * result["schemes"][0]["bytes"]
    result["schemes"][0]["kl"]["mean"] = {"value": 0.000414, "low": 0.0003, "high": 0.0005}
    result["schemes"][1]["kl"]["mean"]["value"] = 0.0001
    result["schemes"][1]["coverage"] = 0.834
    text = Reader(render(result)).text.replace("\u00a0", " ")
    assert (
        "int8_per_channel_weight_only: half the bytes; mean KL 0.000414 (0.000300 to 0.000500),"
        " 1.8 times the noise floor; 99.1 % of next tokens the same; perplexity +0.04 %." in text
    )
    assert "within the noise floor" in text
    assert "only 83.4 % of expert weights are quantized" in text


def test_result_comes_back_out() -> None:
    for result in (make_result(), hostile()):
        page = render(result)
        assert json.loads(Reader(page).script) == result
        # Nothing but this block is in it
        assert page.count("<script") == page.count("</script") == 1


def test_figures_are_numbered_as_they_come() -> None:
    everything = re.compile(r"<b>((?:Figure|Table) \d)\.</b>").findall(render(make_result()))
    assert everything == [
        "Table 1", "Figure 1", "Figure 2", "Figure 3", "Figure 4", "Table 2", "Figure 5",
    ]  # fmt: skip
    result = make_result()
    result["experts"] = {}
    assert "<b>Figure 3.</b> How many of the experts that a router chooses" in render(result)


def test_what_json_lacks_is_null_in_the_data() -> None:
    result = make_result()
    result["schemes"][0]["perplexity"]["value"] = math.nan
    reader = Reader(render(result))
    assert json.loads(reader.script)["schemes"][0]["perplexity"]["value"] is None
    assert "not finite" in reader.text


def test_names_are_no_markup() -> None:
    page, plain = render(hostile()), render(make_result(layers=len(HOSTILE), experts=4))
    reader = Reader(page)
    # The elements are those of harmless names
    kinds = {tag for tag, _ in Reader(plain).elements}
    assert {tag for tag, _ in reader.elements} <= kinds
    assert not [a for _, a in reader.elements for name in a if name.startswith("on")]
    assert "<script>alert(1)</script>" in reader.text
    assert r"<!-- \x00\x1b[31m\u202e\udc80 ]]> &lt; &amp;" in reader.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", page)
    page.encode("utf-8")


@pytest.mark.parametrize("result", [make_result(), hostile(), linears_only()])
def test_page_needs_and_reaches_nothing(result: dict[str, Any]) -> None:
    page = render(result)
    reader = Reader(page)
    policy = reader.of("meta")[1]
    assert policy == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    }
    reaching = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"}
    assert not [a for _, a in reader.elements if reaching & set(a)]


@pytest.mark.parametrize("result", [make_result(), linears_only()])
def test_page_has_no_address(result: dict[str, Any]) -> None:
    page = render(result)
    for address in ("http:", "https:", "//", "url(", "@import", "src="):
        assert address not in page


def test_every_figure_says_what_it_shows() -> None:
    figures = [a for a in Reader(render(make_result())).of("svg") if "aria-hidden" not in a]
    # Size; six schemes' experts, five schemes' linears; usage; routers; six loads
    assert len(figures) == 1 + 2 * 6 + 2 * 5 + 1 + 1 + 6
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in figures)


SECTIONS = {
    "Size against fidelity": lambda r: [s.pop("kl") for s in r["schemes"]],
    "Error by layer": lambda r: [s.pop("layers") for s in r["schemes"]],
    "Use of experts": lambda r: r.pop("experts"),
    "Routers": lambda r: [x.pop("router_agreement") for s in r["schemes"] for x in s["layers"]],
    "Outliers": lambda r: [s.pop("outliers") for s in r["schemes"]],
    "Memory while loading": lambda r: [s.pop("load") for s in r["schemes"]],
    "What stays unquantized": lambda r: [s.pop("kept") for s in r["schemes"]],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_what_has_no_data_has_no_section(section: str) -> None:
    result = make_result()
    assert f"<h2>{section}</h2>" in render(result)
    SECTIONS[section](result)
    page = render(result)
    Reader(page)
    assert f"<h2>{section}</h2>" not in page


@pytest.mark.parametrize(
    "missing",
    ["noise_floor", "peak_bytes", "experts"],
)
def test_null_is_as_good_as_missing(missing: str) -> None:
    result = make_result()
    null = render(result | {missing: None})
    del result[missing]
    strip = re.compile(r"<script.*</script>", re.DOTALL)
    assert strip.sub("", null) == strip.sub("", render(result))


def test_nothing_differs() -> None:
    text = Reader(render(degenerate())).text.replace("\u00a0", " ")
    assert "mean KL 0 (0 to 0)" in text
    assert "100 % of next tokens the same" in text
    assert "10⁻⁸" in text
    assert "1 of 1 experts got no token" in text


def test_no_number_at_all() -> None:
    result = make_result()
    for scheme in result["schemes"]:
        for interval in scheme["kl"].values():
            interval |= {"value": math.nan, "low": math.nan, "high": math.inf}
        for layer in scheme["layers"]:
            layer |= {"output_error": math.nan, "weight_error": [math.nan] * 16}
    page = render(result)
    assert "nan" not in re.sub(r'data-\w+="nan"', "", page.split("<script")[0])
    Reader(page)


def test_a_load_whose_peak_was_not_read() -> None:
    result = make_result()
    for scheme in result["schemes"]:
        scheme["load"]["actual_peak_bytes"] = None
    assert "planned" in Reader(render(result)).text


def test_a_peak_survives_a_long_timeline() -> None:
    result = make_result()
    load = result["schemes"][0]["load"]
    load["timeline"] = [[i / 10_000, 1e6] for i in range(10_000)]
    load["timeline"][6_789][1] = 2e6
    usual = render(result)
    load["timeline"][6_789][1] = 1e6
    assert len(usual) < 600_000
    strip = re.compile(r"<script.*</script>", re.DOTALL)
    assert strip.sub("", usual) != strip.sub("", render(result))


def test_a_large_model_is_a_few_megabytes() -> None:
    page = render(make_result(layers=64, experts=512))
    assert "the largest of 4 neighbouring experts" in page
    assert len(page) < 1_000_000 * len(SCHEMES)
    # Nearly all of that is the data
    assert len(re.sub(r"<script.*</script>", "", page, flags=re.DOTALL)) < 1_500_000


def test_result_is_left_as_it_was() -> None:
    result = make_result()
    before = copy.deepcopy(result)
    render(result)
    assert result == before


def test_a_column_shows_its_largest() -> None:
    values = [0.1] * 512
    values[511] = 1.0
    figure = heat_map([("0", values)], title="error", write=words.percent)
    darkest = re.search(r'class="r23" d="M(\d+) \d+h(\d+)', figure)
    lightest = re.search(r'class="r0" d="M(\d+) \d+h(\d+)', figure)
    assert darkest and lightest
    # 128 columns of 4 pixels, of which the last is dark
    assert int(lightest[2]) == 127 * 4 and int(darkest[2]) == 4
    assert int(darkest[1]) - int(lightest[1]) == 127 * 4
    assert "largest in expert 511" in figure


def test_near_equal_values_do_not_look_different() -> None:
    values = [0.0250, 0.02501, 0.02502]
    figure = heat_map([("0", values)], title="error", write=words.percent)
    assert set(re.findall(r'path class="(r\d+)"', figure)) <= {"r11", "r12"}


@pytest.mark.parametrize(
    ("share", "written"),
    [
        (1.0, "100 %"), (0.99712, "99.7 %"), (0.99971, "99.97 %"), (0.9999999, "99.9999 %"),
        (0.917, "91.7 %"), (0.5, "50.0 %"), (0.0, "0.0 %"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_agreement_is_100_only_if_it_is(share: float, written: str) -> None:
    assert words.agreement(share).replace("\u00a0", " ") == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"), (0.00041234, "0.000412"), (0.0000041234, "4.12 × 10⁻⁶"), (1234.5, "1,234"),
        (0.9999, "1.00"), (-0.5, "−0.500"), (12_345_678.0, "1.23 × 10⁷"), (math.inf, "not finite"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, written: str) -> None:
    assert words.number(value).replace("\u00a0", " ") == written


def test_days() -> None:
    assert words.day("2026-11-23T17:00:00+00:00") == "23 November 2026, 17:00 UTC"
    assert words.day("2026-11-23T17:00:00") == "23 November 2026, 17:00"
    assert words.day("yesterday") == "yesterday"


def test_says_what_was_not_seen_and_what_kernels_do_otherwise() -> None:
    result = make_result()
    assert "does not reach" not in render(result)
    result["schemes"][1] |= {"unseen": ["visual.0", "visual.1"], "notes": ["<b>no fp8 units"]}
    page = render(result)
    assert "2 quantized layers that text does not reach are not in it" in page
    assert "&lt;b&gt;no fp8 units" in page
