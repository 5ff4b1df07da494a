"""Which checkpoint tensors feed which layer, and that all of them are there.

For the layers that we quantize we read the tensors ourselves, so that a layer's experts are never
merged in bf16; `hf_router` says where each tensor goes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.checkpoint.encodings import EncodedSpec
from moeq.checkpoint.headers import TensorSpec
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_router import Route, Router, fed_by, source_of
from moeq.engines.hf_structure import Target, experts_shape, fp32_patterns, is_experts
from moeq.errors import CheckpointError, ModelError
from moeq.plan import LayerPlan, LayerShape, Part, Source, check_sources
from moeq.quantize import WEIGHT_DTYPES


@dataclass(frozen=True)
class KeptExperts:
    """Experts that are not quantized, but stored as codes: transformers cannot merge those.

    Attributes:
        module: on the meta device.
        shape: its sizes.
        sources: parameter of the model -> its tensors.
    """

    module: nn.Module
    shape: LayerShape
    sources: dict[str, tuple[Source, ...]]


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
        dropped: tensors that the model has no place for.
        kept_experts: that we merge ourselves.
    """

    plans: tuple[LayerPlan, ...]
    merged: tuple[str, ...]
    claims: dict[str, str]
    sources: dict[str, tuple[Source, ...]]
    plain: dict[str, TensorSpec]
    plain_claims: dict[str, str]
    dropped: tuple[str, ...]
    kept_experts: tuple[KeptExperts, ...]

    @property
    def encoded(self) -> dict[str, TensorSpec]:
        """Those of `plain` that are stored as codes, which transformers would take for numbers."""
        return {p: spec for p, spec in self.plain.items() if isinstance(spec, EncodedSpec)}

    @property
    def decoded(self) -> tuple[TensorSpec, ...]:
        """What is held in bf16 and stored as codes."""
        merged = [s.spec for e in self.kept_experts for mine in e.sources.values() for s in mine]
        return (*self.encoded.values(), *merged)


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
    routes = find_routes(model, targets, specs, conversions, strict=config.strict)
    if routes.merged:
        kept = kept | dict.fromkeys(routes.merged, "transformers merges it from several tensors")
        config = config.ignoring(routes.merged)
        targets = [target for target in targets if target.shape.name not in routes.merged]
    return Decision(config, targets, kept, routes)


def find_routes(
    model: nn.Module,
    targets: Iterable[Target],
    specs: Mapping[str, TensorSpec],
    conversions: list[Any],
    *,
    strict: bool = True,
) -> Routes:
    """Sources of every target, checked to be complete.

    Args:
        model: on the meta device, its original parameters in place.
        targets: the layers to be quantized.
        specs: of the checkpoint.
        conversions: transformers' table for this model.
        strict: whether a tensor that the model has no place for is an error.

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
    kept: dict[str, list[tuple[Route, Any]]] = {}
    unknown = []
    for route, converter in _routes(model, specs, conversions):
        _check_kept(route, wanted, state)
        feeds = fed_by(route, converter)
        fed.update(feeds)
        if state.keys().isdisjoint(feeds):
            unknown.append(route)
        for parameter in feeds:
            if parameter in wanted:
                by_parameter.setdefault(parameter, []).append(route)
                if route.pattern is not None:
                    converters[parameter] = converter
        if route.parameter not in wanted:
            kept.setdefault(route.parameter, []).append((route, converter))
    merged = tuple(p.rpartition(".")[0] for p in converters if wanted[p][0].shape.kind == "linear")
    targets = [target for target in targets if target.shape.name not in merged]
    claims, sources = {}, {}
    for parameter, routes in by_parameter.items():
        target, name = wanted[parameter]
        converter = converters.get(parameter)
        if target.shape.name in merged:
            _refuse_encoded(parameter, routes)
            continue
        sources[parameter] = tuple(
            source_of(route, converter, target.module, target.shape, name) for route in routes
        )
        claims.update({key: parameter for route in routes for key in route.stored})
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
    dropped = _without_place(model, unknown)
    if strict:
        _refuse(model, dropped)
    plain = {
        parameter: routes[0][0]
        for parameter, routes in kept.items()
        if len(routes) == 1
        and routes[0][0].pattern is None
        and type(state.get(parameter)) is Tensor
        and not any(re.search(pattern, parameter) for pattern in fp32)
    }
    kept_experts = _kept_experts(model, {p: r for p, r in kept.items() if p in state}, plain)
    claims.update(
        {
            key: parameter
            for experts in kept_experts
            for parameter in experts.sources
            for route, _ in kept[parameter]
            for key in route.stored
        }
    )
    plain = {p: r for p, r in plain.items() if all(p not in e.sources for e in kept_experts)}
    return Routes(
        tuple(plans),
        merged,
        claims,
        sources,
        {parameter: route.spec for parameter, route in plain.items()},
        {key: parameter for parameter, route in plain.items() for key in route.stored},
        tuple(spec.name for spec in dropped),
        kept_experts,
    )


def _kept_experts(
    model: nn.Module, kept: Mapping[str, list[tuple[Route, Any]]], plain: Container[str]
) -> tuple[KeptExperts, ...]:
    """Whatever is kept, stored as codes, and more than a tensor that can be decoded as it is."""
    found: dict[str, KeptExperts] = {}
    for parameter, routes in kept.items():
        is_encoded = any(isinstance(route.spec, EncodedSpec) for route, _ in routes)
        name = parameter.rpartition(".")[0]
        if parameter in plain or not is_encoded or name in found:
            continue
        module = model.get_submodule(name)
        if not is_experts(module):
            _refuse_encoded(parameter, [route for route, _ in routes])
        shape, up_name = experts_shape(name, module)
        sources = {
            f"{name}.{own}": tuple(
                source_of(route, converter, module, shape, own)
                for route, converter in kept.get(f"{name}.{own}", ())
            )
            for own in experts_names(shape, up_name)
        }
        check_sources(shape, (source for mine in sources.values() for source in mine))
        found[name] = KeptExperts(module, shape, sources)
    return tuple(found.values())


def _refuse_encoded(parameter: str, routes: Iterable[Route]) -> None:
    for route in routes:
        if isinstance(route.spec, EncodedSpec):
            raise ModelError(
                f"{parameter}: transformers builds it from {route.spec.keys[0]!r}, whose codes moeq"
                " would have to decode first",
                hint="start from an unquantized checkpoint of this model",
            )


_OURS = tuple(
    f"{w}_{p}" for w in ("w13", "w2", "weight") for p in ("codes", "scale", "group_scale")
)


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


_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""What older checkpoints hold and models compute: transformers ignores it for every model."""


def _without_place(model: Any, unknown: Iterable[Route]) -> list[TensorSpec]:
    """Of the tensors that feed nothing, all but those that the model itself says it does without:
    layers that predict further tokens, parts that another class has. Who names another class than
    config.json does wants a part of the checkpoint."""
    config = model.config
    saved_from = config.architectures  # a careless config has none, or anything
    if isinstance(saved_from, list) and saved_from and type(model).__name__ not in saved_from:
        return []
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
    return [
        route.spec
        for route in unknown
        if not any(re.search(p, n) for p in patterns for n in (route.spec.name, route.parameter))
        and not _predicts_further(config, route.parameter)
    ]


def _refuse(model: Any, dropped: list[TensorSpec]) -> None:
    for spec in dropped[:1]:
        more = f" (and {len(dropped) - 1} more)" if len(dropped) > 1 else ""
        raise CheckpointError(
            f"{spec.file.name}: {spec.name!r}{more} is no tensor of {type(model).__name__} as"
            " config.json describes it, and would be dropped",
            hint="config.json and checkpoint disagree, or the checkpoint is of another model;"
            " strict=False (--no-strict) drops such tensors",
        )


def _predicts_further(config: Any, parameter: str) -> bool:
    """Whether a parameter is of the layers that published checkpoints have after the model's own,
    for predicting several tokens at once."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    further = getattr(text, "num_nextn_predict_layers", None)
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", parameter)
    if layer is None or not isinstance(layers, int) or not isinstance(further, int):
        return False
    return layers <= int(layer[1]) < layers + further


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
    unknown = []
    for route, converter in _routes(model, specs, conversions):
        _check_kept(route, ours, state)
        found[route.parameter] = route.spec
        feeds = fed_by(route, converter)
        fed.update(feeds)
        if state.keys().isdisjoint(feeds):
            unknown.append(route)
    check_rest(model, fed | ours)
    _refuse(model, _without_place(model, unknown))
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
            part: Part = "up" if name.startswith("w13") else "down"
            sources.append(Source(spec, part, is_bias=name.endswith("_bias")))
        plans.append(LayerPlan(target.shape, target.scheme, tuple(sources)))
    return tuple(plans)


def quantized_names(module: nn.Module) -> list[str]:
    """The parameters that a method has registered on a layer."""
    return [name for name in module._parameters if name.startswith(("w13_", "w2_", "weight_"))]


def original_names(target: Target) -> tuple[str, ...]:
    if target.shape.kind == "linear":
        return (target.up_name,)
    return experts_names(target.shape, target.up_name)


def experts_names(shape: LayerShape, up_name: str) -> tuple[str, ...]:
    """Parameters of transformers' shared kind of experts."""
    names = (up_name, "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if shape.has_bias else names


def _routes(
    model: Any, specs: Mapping[str, TensorSpec], conversions: list[Any]
) -> Iterable[tuple[Route, Any]]:
    from transformers.core_model_loading import dot_natural_key

    router = Router(model, conversions)
    for key in sorted(specs, key=dot_natural_key):
        yield router.route(specs[key])
