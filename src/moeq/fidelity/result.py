"""What an evaluation found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moeq.fidelity.statistics import Interval, Spread


@dataclass(frozen=True)
class Fidelity:
    """How far a model is from the original, over the tokens of a text.

    Attributes:
        kl: divergence of its next-token distribution from the original's, nats.
        top1_agreement: share of tokens for which both find the same next one the likeliest.
        perplexity: its own.
        perplexity_ratio: that over the original's.
        router_agreement: share of a token's top-k experts that are those of the original, over all
            layers; None for a model whose routers are not seen.
    """

    kl: Spread
    top1_agreement: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    router_agreement: Interval | None


@dataclass(frozen=True)
class LayerFidelity:
    """One quantized layer.

    Attributes:
        name: of the module.
        kind: "moe" or "linear".
        scheme: it has.
        output_error: |y' - y| / |y| on the original's inputs.
        router_agreement: as of the whole model, before this layer.
        weight_error: |W' - W| / |W| of each expert, or of the one weight.
    """

    name: str
    kind: str
    scheme: str
    output_error: float
    router_agreement: float | None
    weight_error: tuple[float, ...]


@dataclass(frozen=True)
class Outlier:
    """A layer or expert that is much worse than its like: above the median of its kind by more
    than `_FAR` times their median distance from it, and by half."""

    layer: str
    expert: int | None
    what: str
    value: float
    typical: float


@dataclass(frozen=True)
class SchemeFidelity:
    """One scheme, or mixture of schemes.

    Attributes:
        scheme: its name.
        quantization: the config.
        bytes: of weights once loaded.
        expert_bytes: of those, experts.
        coverage: share of expert weights that are quantized.
        fidelity: of the model.
        tokens_per_second: that its passes ran at, one window after another, weights in memory.
        layers: that are quantized and met the text, in the model's order.
        outliers: among them.
        unseen: quantized layers that text does not reach, such as those that see pictures.
        kept: layer -> why it stays as it is.
        notes: what a kernel does differently from the letter of a scheme.
    """

    scheme: str
    quantization: dict[str, Any]
    bytes: int
    expert_bytes: int
    coverage: float
    fidelity: Fidelity
    tokens_per_second: float
    layers: tuple[LayerFidelity, ...]
    outliers: tuple[Outlier, ...]
    unseen: tuple[str, ...]
    kept: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Several schemes against one original.

    Attributes:
        tokens: of the text that were read.
        scored: tokens that had others before them.
        window: tokens per window.
        bytes: of the original's weights.
        expert_bytes: of those, experts.
        perplexity: of the original.
        tokens_per_second: of the original.
        noise_floor: of the original, two windows at a time, from itself one at a time.
        experts: experts module -> tokens that went to each expert of the original.
        schemes: in the order in which they were asked for.
        seconds: that it took.
        peak_bytes: the most memory that it took; None where that cannot be read.
    """

    tokens: int
    scored: int
    window: int
    bytes: int
    expert_bytes: int
    perplexity: Interval
    tokens_per_second: float
    noise_floor: Fidelity
    experts: dict[str, tuple[int, ...]]
    schemes: tuple[SchemeFidelity, ...]
    seconds: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for scheme in found["schemes"]:
            scheme.update(scheme.pop("fidelity"))
        text = {name: found.pop(name) for name in ("tokens", "scored", "window")}
        original = ("bytes", "expert_bytes", "perplexity", "tokens_per_second")
        reference = {name: found.pop(name) for name in original}
        return {"text": text, "reference": reference, **found}


def finite(value: Any) -> Any:
    """With NaN and infinities, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FAR = 6.0


def outliers(layers: tuple[LayerFidelity, ...]) -> tuple[Outlier, ...]:
    """Experts and layers that stand out, the worst first."""
    found = []
    for kind in dict.fromkeys((layer.kind, layer.scheme) for layer in layers):
        alike = [layer for layer in layers if (layer.kind, layer.scheme) == kind]
        outputs = {(layer.name, None): layer.output_error for layer in alike}
        weights = {
            (layer.name, expert if layer.kind == "moe" else None): error
            for layer in alike
            for expert, error in enumerate(layer.weight_error)
        }
        for what, errors in (("output error", outputs), ("weight error", weights)):
            typical = _median(list(errors.values()))
            distance = _median([abs(error - typical) for error in errors.values()])
            limit = max(typical + _FAR * distance, 1.5 * typical)
            found += [
                Outlier(layer, expert, what, error, typical)
                for (layer, expert), error in errors.items()
                if error > limit
            ]
    return tuple(sorted(found, key=lambda o: o.value / o.typical if o.typical else 0, reverse=True))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
