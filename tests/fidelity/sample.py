"""Results as `moeq eval --json` prints them, made up: small, large, hostile."""

from __future__ import annotations

import math
import random
from typing import Any

Result = dict[str, Any]

SCHEMES = {
    # weight error, mean KL, bytes of a weight
    "int8_per_channel_weight_only": (0.0052, 0.00041, 1.02),
    "fp8_per_tensor": (0.0262, 0.0034, 1.0),
    "fp8_per_channel": (0.0258, 0.0021, 1.02),
    "fp8_per_block": (0.0255, 0.0023, 1.001),
    "int8_per_channel": (0.0052, 0.00093, 1.02),
    "int4_per_group_weight_only": (0.084, 0.021, 0.53),
}


def make_result(*, layers: int = 6, experts: int = 16, load: bool = True) -> Result:
    """A plausible result for a model of this many layers and experts a layer."""
    rng = random.Random(0)
    names = [f"model.layers.{i}.mlp.experts" for i in range(layers)]
    weights = layers * experts * 123_000
    rest = weights // 3
    return {
        "moeq": "0.1.0",
        "versions": {"python": "3.11.2", "torch": "2.11.0+cpu", "transformers": "5.23.0"},
        "command": "moeq eval tiny_python -q int8_per_channel_weight_only -q fp8_per_tensor --json",
        "date": "2026-11-23T17:00:00+00:00",
        "model": "tiny_python",
        "device": "cpu",
        "text": {
            "source": "held-out text of the embedded model",
            "tokens": 8192,
            "scored": 8176,
            "window": 512,
        },
        "seconds": 41.234,
        "peak_bytes": 123_456_789,
        "reference": {
            "bytes": 2 * weights + rest,
            "expert_bytes": 2 * weights,
            "perplexity": interval(10.4342, 0.02),
            "tokens_per_second": 6321.5,
        },
        "noise_floor": {
            "kl": kl(0.00023),
            "top1_agreement": interval(0.9954, 0.001),
            "perplexity": interval(10.4339, 0.02),
            "perplexity_ratio": interval(0.99997, 0.0001),
            "router_agreement": interval(0.9981, 0.0004),
        },
        "experts": {
            name: [int(8192 * 2 / experts * rng.lognormvariate(-0.3, 0.8)) for _ in range(experts)]
            for name in names
        },
        "schemes": [
            make_scheme(rng, name, names, experts, weights, rest, load=load) for name in SCHEMES
        ],
    }


def make_scheme(
    rng: random.Random,
    name: str,
    names: list[str],
    experts: int,
    weights: int,
    rest: int,
    *,
    load: bool,
) -> Result:
    error, divergence, each = SCHEMES[name]
    linears = name != "int8_per_channel_weight_only"
    nbytes = int(weights * each) + rest // (2 if linears else 1)
    layers: list[Result] = [
        {
            "name": layer,
            "kind": "moe",
            "scheme": name,
            "output_error": error * (1 + 0.5 * math.sin(i)) * rng.uniform(0.9, 1.3),
            "router_agreement": 1 - 0.3 * error * (i + 1) / len(names) * rng.uniform(0.6, 1.4),
            "weight_error": [
                error * (1 + 0.1 * math.sin(i / 2) + rng.gauss(0, 0.03)) for _ in range(experts)
            ],
        }
        for i, layer in enumerate(names)
    ]
    layers[-1]["weight_error"][experts // 3] *= 1.6
    if linears:
        layers += [
            {
                "name": layer.replace("mlp.experts", f"self_attn.{part}_proj"),
                "kind": "linear",
                "scheme": name,
                "output_error": error * rng.uniform(0.5, 1.5),
                "router_agreement": None,
                "weight_error": [error * rng.uniform(0.9, 1.1)],
            }
            for layer in names
            for part in "qkvo"
        ]
    kept = {"lm_head": "shares its weight with another layer"}
    if not linears:
        kept |= {
            layer.replace("mlp.experts", f"self_attn.{part}_proj"): "linear not covered"
            for layer in names
            for part in "qkvo"
        }
    seconds = rng.uniform(0.08, 0.14)
    peak = int(1.06 * nbytes)
    steps = 60
    return {
        "scheme": name,
        "quantization": {"quantization": name, "linear": None, "moe": None, "ignore": []},
        "bytes": nbytes,
        "expert_bytes": int(weights * each),
        "coverage": 1.0,
        "kl": kl(divergence),
        "top1_agreement": interval(1 - 20 * divergence, 0.002),
        "perplexity": interval(10.4342 * (1 + divergence), 0.02),
        "perplexity_ratio": interval(1 + divergence, divergence),
        "router_agreement": interval(1 - 0.3 * error, 0.001),
        "tokens_per_second": 6321.5 * rng.uniform(0.8, 1.4),
        "layers": layers,
        "outliers": [
            {
                "layer": names[-1],
                "expert": experts // 3,
                "what": "weight error",
                "value": 1.6 * error,
                "typical": error,
            },
            {
                "layer": names[-1],
                "expert": None,
                "what": "router agreement",
                "value": 1 - 0.5 * error,
                "typical": 1 - 0.2 * error,
            },
        ],
        "kept": kept,
        "load": {
            "seconds": seconds,
            "planned_peak_bytes": peak,
            "actual_peak_bytes": int(0.97 * peak),
            "final_bytes": nbytes,
            "timeline": [
                [seconds * i / steps, 0.97 * peak * math.sin(1.7 * i / steps) ** 0.8]
                for i in range(steps + 1)
            ],
        }
        if load
        else None,
    }


def interval(value: float, relative: float) -> Result:
    width = abs(value) * relative
    return {"value": value, "low": value - width, "high": value + 1.2 * width}


def kl(mean: float) -> Result:
    return {
        "mean": interval(mean, 0.12),
        "median": interval(0.3 * mean, 0.08),
        "p99": interval(9 * mean, 0.15),
        "max": interval(70 * mean, 0.3),
    }


def linears_only() -> Result:
    """No experts were quantized, no load was measured, and the noise floor is not known."""
    result = make_result(load=False)
    result |= {"experts": {}, "noise_floor": None, "peak_bytes": None}
    result["schemes"] = result["schemes"][1:]
    for scheme in result["schemes"]:
        scheme["layers"] = [layer for layer in scheme["layers"] if layer["kind"] == "linear"]
        scheme |= {"router_agreement": None, "kept": {}, "outliers": []}
    return result


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "'onload='alert(4)",
    "<!-- \x00\x1b[31m\u202e\udc80 ]]> &lt; &amp;",
    "</title></style><style>body{display:none}</style>",
)


def hostile() -> Result:
    """Every name is one that a page could trip over."""
    result = make_result(layers=len(HOSTILE), experts=4)
    result["model"], result["command"], result["device"], result["date"] = HOSTILE[:4]
    result["text"]["source"] = HOSTILE[4]
    result["versions"] = {name: name for name in HOSTILE}
    result["experts"] = dict(zip(HOSTILE, result["experts"].values()))
    for scheme in result["schemes"]:
        name = HOSTILE[len(scheme["scheme"]) % len(HOSTILE)]
        scheme |= {"scheme": name, "kept": {name: name for name in HOSTILE}}
        scheme["quantization"] = {name: name for name in HOSTILE}
        for layer, name in zip(scheme["layers"], HOSTILE * 5):
            layer["name"] = f"{name}.{layer['name']}" if layer["kind"] == "linear" else name
        for outlier in scheme["outliers"]:
            outlier |= {"layer": HOSTILE[1], "what": HOSTILE[2]}
    return result


COLUMNS = (
    "bytes", "expert_bytes", "kl.mean", "kl.median", "kl.p99", "kl.max", "top1_agreement",
    "router_agreement", "perplexity", "perplexity_ratio", "tokens_per_second",
)  # fmt: skip


def summary_numbers(result: Result) -> list[list[float]]:
    """What the summary has to say: for bf16, the noise floor and each scheme."""
    rows = [result["reference"], result["noise_floor"], *result["schemes"]]
    found = []
    for row in filter(None, rows):
        numbers: list[float] = []
        for column in COLUMNS:
            value = row
            for key in column.split("."):
                value = (value or {}).get(key)
            if isinstance(value, dict):
                numbers += value["value"], value["low"], value["high"]
            elif value is not None:
                numbers.append(value)
        found.append(numbers)
    return found


def degenerate() -> Result:
    """One layer of one expert, and next to nothing differs from bf16."""
    result = make_result(layers=1, experts=1)
    nothing = interval(0.0, 0.0)
    for scheme in result["schemes"]:
        scheme["kl"] = dict.fromkeys(scheme["kl"], nothing)
        scheme |= {"top1_agreement": interval(1.0, 0.0), "router_agreement": interval(1.0, 0.0)}
        for layer in scheme["layers"]:
            layer |= {"output_error": 0.0, "weight_error": [0.0], "router_agreement": 1.0}
    result["noise_floor"]["kl"] = result["schemes"][0]["kl"]
    result["experts"] = {layer: [0] for layer in result["experts"]}
    result["schemes"][0]["load"]["timeline"] = [[0.0, 0.0]]
    result["schemes"][1]["load"]["timeline"] = []
    result["schemes"][2]["kl"] = kl(3e-9)
    return result
