"""Which checkpoint tensors feed which layer, by transformers' own table of conversions.

transformers renames and merges checkpoint tensors on their way into a model (`WeightRenaming`,
`WeightConverter` in `core_model_loading`). We ask that table where every key goes; for the layers
that we quantize we then read the tensors ourselves, so that a layer's experts are never merged in
bf16. What a table entry does to the weights must be one of a few things that keep experts apart;
anything else is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.checkpoint.headers import TensorSpec
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_structure import Target, fp32_patterns
from moeq.errors import CheckpointError, ModelError
from moeq.plan import LayerPlan, Part, Source, check_sources
from moeq.quantize import WEIGHT_DTYPES


@dataclass(frozen=True)
class Routes:
    """Where keys go.

    Attributes:
        plans: the layers that are quantized, with their sources.
        merged: linears that are not, because transformers builds them from parts of several
            tensors.
        claims: checkpoint key after renamings -> parameter of the model it feeds, for every tensor
            that we read.
        sources: that parameter -> its tensors.
        plain: parameter -> the one tensor that it is, where no conversion touches it and it is not
            quantized.
        plain_claims: as `claims`, for those.
    """

    plans: tuple[LayerPlan, ...]
    merged: tuple[str, ...]
    claims: dict[str, str]
    sources: dict[str, tuple[Source, ...]]
    plain: dict[str, TensorSpec]
    plain_claims: dict[str, str]


@dataclass(frozen=True)
class Decision:
    """What becomes of a model's layers.

    Attributes:
        config: as asked, and with what cannot be quantized among the ignored.
        targets: the layers that are quantized.
        kept: layer -> the rule that keeps it unquantized.
        routes: of their tensors.
    """

    config: OnlineQuantizationConfig
    targets: list[Target]
    kept: dict[str, str]
    routes: Routes


def decide(
    model: nn.Module,
    config: OnlineQuantizationConfig,
    found: tuple[list[Target], dict[str, str]],
    specs: Mapping[str, TensorSpec],
    conversions: list[Any],
) -> Decision:
    """Before the first byte: every tensor has its place, and every layer its scheme or its rule.

    Args:
        model: on the meta device, its original parameters in place.
        config: as asked.
        found: by `find_targets`.
        specs: of the checkpoint.
        conversions: transformers' table for this model.

    Raises:
        CheckpointError, ModelError: see `find_routes`.
    """
    targets, kept = found
    routes = find_routes(model, targets, specs, conversions)
    if routes.merged:
        kept = kept | dict.fromkeys(routes.merged, "transformers merges it from several tensors")
        config = config.ignoring(routes.merged)
        targets = [target for target in targets if target.shape.name not in routes.merged]
    return Decision(config, targets, kept, routes)


@dataclass(frozen=True)
class Route:
    """One key: after renamings, where it ends, and the conversion pattern it met on the way."""

    spec: TensorSpec
    renamed: str
    parameter: str
    pattern: str | None


def find_routes(
    model: nn.Module,
    targets: Iterable[Target],
    specs: Mapping[str, TensorSpec],
    conversions: list[Any],
) -> Routes:
    """Sources of every target, checked to be complete.

    Args:
        model: on the meta device, its original parameters in place.
        targets: the layers to be quantized.
        specs: of the checkpoint.
        conversions: transformers' table for this model.

    Raises:
        CheckpointError: see `check_sources`.
        ModelError: a conversion that moeq cannot do expert by expert.
    """
    targets = list(targets)
    wanted = {
        f"{target.shape.name}.{name}": (target, name)
        for target in targets
        for name in original_names(target)
    }
    converters = {}
    by_parameter: dict[str, list[Route]] = {}
    fed: set[str] = set()
    state = model.state_dict()
    fp32 = fp32_patterns(model)
    kept: dict[str, list[Route]] = {}
    for route, converter in _routes(model, specs, conversions):
        _check_kept(route, wanted, state)
        fed.update(fed_by(route, converter))
        if not any(re.search(pattern, route.parameter) for pattern in fp32):
            kept.setdefault(route.parameter, []).append(route)
        for parameter in fed_by(route, converter):
            if parameter in wanted:
                by_parameter.setdefault(parameter, []).append(route)
                if route.pattern is not None:
                    converters[parameter] = converter
    merged = tuple(p.rpartition(".")[0] for p in converters if wanted[p][0].shape.kind == "linear")
    targets = [target for target in targets if target.shape.name not in merged]
    claims, sources = {}, {}
    for parameter, routes in by_parameter.items():
        target, name = wanted[parameter]
        converter = converters.get(parameter)
        if target.shape.name in merged:
            continue
        sources[parameter] = tuple(
            source_of(route, converter, target, name, parameter) for route in routes
        )
        claims.update({route.renamed: parameter for route in routes})
    plans = []
    for target in targets:
        mine = tuple(
            source
            for name in original_names(target)
            for source in sources.get(f"{target.shape.name}.{name}", ())
        )
        check_sources(target.shape, mine)
        fed.update(f"{target.shape.name}.{name}" for name in original_names(target))
        plans.append(LayerPlan(target.shape, target.scheme, mine))
    check_rest(model, fed)
    plain = {
        parameter: routes[0]
        for parameter, routes in kept.items()
        if len(routes) == 1
        and routes[0].pattern is None
        and parameter not in wanted
        and type(state.get(parameter)) is Tensor
    }
    return Routes(
        tuple(plans),
        merged,
        claims,
        sources,
        {parameter: route.spec for parameter, route in plain.items()},
        {route.renamed: parameter for parameter, route in plain.items()},
    )


_OURS = tuple(f"{w}_{p}" for w in ("w13", "w2", "weight") for p in ("codes", "scale"))


def _check_kept(route: Route, ours: Container[str], state: Mapping[str, Tensor]) -> None:
    """What transformers will load itself is what the model expects, and not quantized: it would
    take codes for numbers."""
    spec = route.spec
    if route.parameter in ours:
        return
    if route.parameter.rpartition(".")[2] in _OURS:
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} belongs to a quantized weight that the quantization"
            " config does not cover",
            hint="start from the unquantized checkpoint; one that moeq saved needs its own config",
        )
    expected = state.get(route.parameter)
    if expected is None or route.pattern is not None:
        return
    if expected.dtype.is_floating_point and spec.dtype not in (*WEIGHT_DTYPES, torch.float64):
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} has dtype {spec.dtype}, expected a floating one",
            hint="the checkpoint is already quantized; moeq starts from unquantized ones",
        )
    if spec.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r} has shape {list(spec.shape)}, expected"
            f" {list(expected.shape)} for {route.parameter}",
            hint="config.json and checkpoint disagree",
        )


def check_rest(model: Any, fed: set[str]) -> None:
    """What we do not quantize is there too: transformers would fill it with random numbers."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [*(model._keys_to_ignore_on_load_missing or ())]
    missing = [
        name
        for name in model.state_dict()
        if name not in fed
        and name not in tied
        and not any(re.search(pattern, name) for pattern in optional)
    ]
    if missing:
        raise CheckpointError(
            f"missing from the checkpoint: {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            hint="the checkpoint is incomplete, or config.json asks for more than it holds",
        )


def saved_plans(
    model: nn.Module,
    targets: Iterable[Target],
    specs: Mapping[str, TensorSpec],
    conversions: list[Any],
) -> tuple[LayerPlan, ...]:
    """The layers of a checkpoint that we saved, checked to be there as the model expects them.

    Args:
        model: on the meta device, with quantized parameters.
        targets: the layers that are quantized.
        specs: of the checkpoint.
        conversions: transformers' table for this model.

    Raises:
        CheckpointError: a missing or misshapen tensor, or a wrong dtype.
    """
    targets = list(targets)
    ours = {
        f"{target.shape.name}.{name}"
        for target in targets
        for name in quantized_names(target.module)
    }
    found, fed, state = {}, set(), model.state_dict()
    for route, converter in _routes(model, specs, conversions):
        _check_kept(route, ours, state)
        found[route.parameter] = route.spec
        fed.update(fed_by(route, converter))
    check_rest(model, fed | ours)
    plans = []
    for target in targets:
        sources = []
        for name in quantized_names(target.module):
            expected = target.module.get_parameter(name)
            parameter = f"{target.shape.name}.{name}"
            if parameter not in found:
                raise CheckpointError(f"{parameter}: missing from the quantized checkpoint")
            spec = found[parameter]
            if spec.shape != tuple(expected.shape) or spec.dtype != expected.dtype:
                raise CheckpointError(
                    f"{spec.file.name}: {spec.name!r} is {spec.dtype} {list(spec.shape)}, expected"
                    f" {expected.dtype} {list(expected.shape)}"
                )
            sources.append(Source(spec, "down", is_bias=name.endswith("_bias")))
        plans.append(LayerPlan(target.shape, target.scheme, tuple(sources)))
    return tuple(plans)


def quantized_names(module: nn.Module) -> list[str]:
    """The parameters that a method has registered on a layer."""
    return [name for name in module._parameters if name.startswith(("w13_", "w2_", "weight_"))]


def original_names(target: Target) -> tuple[str, ...]:
    if target.shape.kind == "linear":
        return (target.up_name,)
    names = (target.up_name, "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if target.shape.has_bias else names


class Router:
    """Where transformers would put a tensor: `convert_and_load_state_dict_in_model`, dry.

    Args:
        model: on the meta device, its original parameters in place.
        conversions: transformers' table for it.
    """

    def __init__(self, model: Any, conversions: list[Any]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = copy.deepcopy(conversions)  # matching marks an entry as used
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._known = dict.fromkeys(model.state_dict(), True)
        self._prefix = model.base_model_prefix

    def route(self, spec: TensorSpec) -> tuple[Route, Any]:
        """The way of one tensor, and the entry of the table that converts it, if one does."""
        from transformers.core_model_loading import rename_source_key

        key = spec.name
        parameter, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._known
        )
        renamed = key
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        if parameter not in self._known and key in self._known:
            parameter, pattern = key, None
        return Route(spec, renamed, parameter, pattern), self._by_pattern.get(pattern)

    def knows(self, parameter: str) -> bool:
        return parameter in self._known


def _routes(
    model: Any, specs: Mapping[str, TensorSpec], conversions: list[Any]
) -> Iterable[tuple[Route, Any]]:
    from transformers.core_model_loading import dot_natural_key

    router = Router(model, conversions)
    for key in sorted(specs, key=dot_natural_key):
        yield router.route(specs[key])


def fed_by(route: Route, converter: Any) -> list[str]:
    """Every parameter that a tensor ends in: a conversion can split one into several."""
    if converter is None:
        return [route.parameter]
    first, *others = converter.target_patterns
    return [route.parameter, *(route.parameter.replace(first, other) for other in others)]


def source_of(route: Route, converter: Any, target: Target, name: str, parameter: str) -> Source:
    """What one tensor is to the layer, read off the operations that its conversion lists."""
    module: Any = target.module
    is_bias = name.endswith("_bias")
    part: Part = "down" if name.startswith("down") or name == "weight" else "up"
    if name.startswith("gate_up"):
        part = "gate_up"
    transposed = bool(getattr(module, "is_transposed", False)) and not is_bias
    interleaved = part == "gate_up" and not getattr(module, "is_concatenated", True)
    if route.pattern is None:
        return Source(route.spec, part, None, transposed, interleaved, is_bias)
    names = [type(operation).__name__ for operation in converter.operations]
    expert = None
    if names and names[0] == "MergeModulelist":
        expert = _expert_index(route)
        names = names[1:]
    if names == ["Concatenate"] and part == "gate_up" and len(converter.source_patterns) == 2:
        part = "gate" if route.pattern == converter.source_patterns[0] else "up"
        names = []
    elif names == ["Transpose"] and expert is None and not is_bias:
        n, k = target.shape.matrix_shape(part)
        as_is = (k, n) if transposed else (n, k)
        if not (converter.operations[0].check_dims and route.spec.shape[1:] == as_is):
            transposed = not transposed
        names = []
    elif names == ["Interleave"] and part == "gate_up" and not is_bias:
        interleaved = not interleaved
        names = []
    if names:
        raise ModelError(
            f"{parameter}: transformers builds it from {route.spec.name!r} by"
            f" {[type(o).__name__ for o in converter.operations]}, which moeq cannot do while"
            " streaming",
            hint=f"to leave the layer unquantized, add {target.shape.name!r} to ignore",
        )
    return Source(route.spec, part, expert, transposed, interleaved, is_bias)


def _expert_index(route: Route) -> int:
    """The number that the `*` of a pattern stands for in a key."""
    assert route.pattern is not None
    expression = route.pattern.replace("*", r"(?P<expert>\d+)")
    match = re.search(expression, route.renamed)
    if match is None:
        raise CheckpointError(f"{route.spec.name}: no expert's number where {expression} has one")
    return int(match["expert"])
