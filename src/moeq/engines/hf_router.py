"""Where one checkpoint tensor goes, by transformers' own table of conversions.

transformers renames and merges checkpoint tensors on their way into a model (`WeightRenaming`,
`WeightConverter` in `core_model_loading`). We ask that table where a key goes, and read off the
operations that it lists what the tensor is to a layer: they must be one of a few things that keep
experts apart; anything else is refused by name.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from moeq.checkpoint.headers import TensorSpec
from moeq.errors import CheckpointError, ModelError
from moeq.plan import LayerShape, Part, Source


@dataclass(frozen=True)
class Route:
    """One tensor: its key after renamings, where it ends, the conversion pattern it met on the way,
    and the keys, after renamings, of what is stored for it."""

    spec: TensorSpec
    renamed: str
    parameter: str
    pattern: str | None
    stored: tuple[str, ...]


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
        renamed = self._renamed(key)
        parameter, pattern = rename_source_key(
            renamed, [], self._converters, self._prefix, self._known
        )
        if parameter not in self._known and key in self._known:
            parameter, pattern = key, None
        stored = tuple(map(self._renamed, spec.keys))
        return Route(spec, renamed, parameter, pattern, stored), self._by_pattern.get(pattern)

    def _renamed(self, key: str) -> str:
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def knows(self, parameter: str) -> bool:
        return parameter in self._known


def fed_by(route: Route, converter: Any) -> list[str]:
    """Every parameter that a tensor ends in: a conversion can split one into several."""
    if converter is None:
        return [route.parameter]
    first, *others = converter.target_patterns
    return [route.parameter, *(route.parameter.replace(first, other) for other in others)]


def source_of(route: Route, converter: Any, module: Any, shape: LayerShape, name: str) -> Source:
    """What one tensor is to a layer, read off the operations that its conversion lists.

    Args:
        route: of the tensor.
        converter: the entry of the table that converts it, if one does.
        module: the layer, its original parameters in place.
        shape: its sizes.
        name: of the parameter that the tensor feeds.

    Raises:
        ModelError: operations that moeq does not know.
    """
    is_bias = name.endswith("_bias")
    part: Part = "down" if name.startswith("down") or name == "weight" else "up"
    if name.startswith("gate_up"):
        part = "gate_up"
    transposed = bool(getattr(module, "is_transposed", False)) and not is_bias
    interleaved = part == "gate_up" and not getattr(module, "is_concatenated", True)
    if route.pattern is None:
        transposed = transposed != route.spec.is_flipped
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
        n, k = shape.matrix_shape(part)
        as_is = (k, n) if transposed else (n, k)
        if not (converter.operations[0].check_dims and route.spec.shape[1:] == as_is):
            transposed = not transposed
        names = []
    elif names == ["Interleave"] and part == "gate_up" and not is_bias:
        interleaved = not interleaved
        names = []
    if names:
        raise ModelError(
            f"{shape.name}.{name}: transformers builds it from {route.spec.name!r} by"
            f" {[type(o).__name__ for o in converter.operations]}, which moeq cannot do while"
            " streaming",
            hint=f"to leave the layer unquantized, add {shape.name!r} to ignore",
        )
    transposed = transposed != route.spec.is_flipped
    return Source(route.spec, part, expert, transposed, interleaved, is_bias)


def _expert_index(route: Route) -> int:
    """The number that the `*` of a pattern stands for in a key."""
    assert route.pattern is not None
    expression = route.pattern.replace("*", r"(?P<expert>\d+)")
    match = re.search(expression, route.renamed)
    if match is None:
        raise CheckpointError(f"{route.spec.name}: no expert's number where {expression} has one")
    return int(match["expert"])
