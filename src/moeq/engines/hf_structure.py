"""Finding what to quantize in a transformers model, by structure and never by its name.

About 64 model families of transformers share one decorator for their experts modules,
`use_experts_implementation` in `transformers.integrations.moe` (read at 5.17 and 5.23); it leaves
attributes that say how a module lays out its weights. Whatever else holds experts is found too, to
be refused by name: no experts stay in bf16 without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.config import OnlineQuantizationConfig
from moeq.errors import ModelError
from moeq.kernels.activations import ACTIVATIONS
from moeq.plan import LayerShape
from moeq.schemes import OnlineQuantScheme

_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "ffn_config.moe_num_experts",
)
"""How configs of transformers spell the number of experts."""

Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A layer to be quantized.

    Attributes:
        module: on the meta device.
        shape: its sizes.
        scheme: it gets.
        up_name: the module's parameter that holds gate and up ("gate_up_proj"), up alone
            ("up_proj"), or a linear's "weight".
    """

    module: nn.Module
    shape: LayerShape
    scheme: OnlineQuantScheme
    up_name: str


def find_targets(
    model: nn.Module, config: OnlineQuantizationConfig
) -> tuple[list[Target], dict[str, str]]:
    """The layers that `config` quantizes, and why every other candidate is kept.

    Raises:
        PatternError: a pattern matches nothing in the model.
        ModelError: no experts, or experts that we cannot quantize and nobody said to ignore.
    """
    modules = dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if is_experts(module)}
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear}
    config.check_patterns([name for name, m in modules.items() if name and _has_weights(m)])
    if config.moe is not None or config.targets:
        _refuse_foreign_experts(model, modules, experts, config)
    protected = _protected_linears(model, experts, linears)

    targets, kept = [], {}
    for name, module in experts.items():
        scheme = config.scheme_for(name, "moe")
        if scheme is None:
            kept[name] = _why(config, name, "moe")
        else:
            shape, up_name = experts_shape(name, module)
            targets.append(Target(module, shape, scheme, up_name))
    for name, linear in linears.items():
        scheme = config.scheme_for(name, "linear")
        if name in protected and name not in config.targets:
            kept[name] = protected[name]
        elif scheme is None:
            kept[name] = _why(config, name, "linear")
        else:
            shape = LayerShape(name, "linear", 1, linear.in_features, linear.out_features)
            targets.append(Target(linear, shape, scheme, "weight"))
    return targets, kept


def is_experts(module: nn.Module) -> bool:
    """Whether a module is of transformers' shared kind of experts."""
    return (
        all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate"))
        and "down_proj" in module._parameters
        and any(name in module._parameters for name in ("gate_up_proj", "up_proj"))
    )


def experts_shape(name: str, module: Any) -> tuple[LayerShape, str]:
    """Sizes of an experts module, and the name of its first projection's parameter.

    Raises:
        ModelError: its parameters contradict each other or its attributes.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = module._parameters.get(up_name), module._parameters["down_proj"]
    if up is None or up.ndim != 3 or down.ndim != 3:
        raise ModelError(f"{name} ({type(module).__name__}): no 3-D {up_name} and down_proj")
    num_experts, n, k = up.shape
    down_shape = tuple(down.shape)
    if module.is_transposed:
        n, k = k, n
        down_shape = (down_shape[0], down_shape[2], down_shape[1])
    intermediate = n // 2 if module.has_gate else n
    if down_shape != (num_experts, k, intermediate):
        raise ModelError(
            f"{name} ({type(module).__name__}): {up_name} {list(up.shape)} and down_proj"
            f" {list(down.shape)} do not fit together"
        )
    has_bias = bool(module.has_bias)
    return LayerShape(name, "moe", num_experts, k, intermediate, module.has_gate, has_bias), up_name


def activation_of(module: Any) -> tuple[str | None, Gate | None, Gate | None]:
    """What runs between the halves of an experts module.

    Returns:
        The name of a standard activation, or None; the module's own gate as a function of the
        canonical layout, where there is no name; and what it applies to every expert's output, if
        anything.
    """
    from transformers.integrations.moe import _default_apply_gate

    after = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    standard = not module.has_gate or type(module)._apply_gate is _default_apply_gate
    name = _activation_name(getattr(module, "act_fn", None)) if standard else None
    if name is not None and after is None:
        return name, None, None
    if not module.has_gate:
        return None, module.act_fn, after
    if module.is_concatenated:
        return None, module._apply_gate, after

    def interleaved(h13: Tensor) -> Tensor:
        out: Tensor = module._apply_gate(torch.stack(h13.chunk(2, dim=-1), dim=-1).flatten(-2))
        return out

    return None, interleaved, after


def _activation_name(function: Any) -> str | None:
    """The name in `ACTIVATIONS` of what a module calls, or None. Compared by what it computes:
    transformers wraps these functions in classes whose names change."""
    if function is None:
        return None
    probe = torch.linspace(-4.0, 4.0, 33, device="cpu")
    found = function(probe)
    for name, known in ACTIVATIONS.items():
        if torch.equal(found, known(probe)):
            return name
    return None


def _refuse_foreign_experts(
    model: nn.Module,
    modules: dict[str, nn.Module],
    experts: dict[str, nn.Module],
    config: OnlineQuantizationConfig,
) -> None:
    counts = set(_expert_counts(getattr(model, "config", None)))
    foreign = [
        name
        for name, module in modules.items()
        if name not in experts and _looks_like_experts(module, counts)
    ]
    for name in foreign:
        if not config.is_ignored(name):
            raise ModelError(
                f"{name} ({type(modules[name]).__name__}) holds experts in a layout that moeq does"
                " not quantize",
                hint=f"to leave them unquantized on purpose, pass ignore=[{name!r}]",
            )
    if not experts and not foreign:
        raise ModelError(
            f"{type(model).__name__} has no experts",
            hint='moeq is for Mixture-of-Experts models; for its linears alone pass moe="none"',
        )


def _looks_like_experts(module: nn.Module, counts: set[int]) -> bool:
    stacked = any(
        p is not None and p.ndim == 3 and p.shape[0] in counts and min(p.shape[1:]) > 1
        for p in module._parameters.values()
    )
    listed = (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(module) in counts
        and len(module) > 1
        and "expert" in " ".join(type(child).__name__.lower() for child in module.children())
    )
    return stacked or listed


def _expert_counts(config: Any) -> Iterator[int]:
    """Every number of experts that a config or its sub-configs mention."""
    if config is None:
        return
    for name in _EXPERT_COUNTS:
        value: Any = config
        for attribute in name.split("."):
            value = getattr(value, attribute, None)
        if isinstance(value, int) and value > 1:
            yield value
    for sub in getattr(config, "sub_configs", None) or {}:
        yield from _expert_counts(getattr(config, sub, None))


def _protected_linears(
    model: Any, experts: dict[str, nn.Module], linears: dict[str, nn.Linear]
) -> dict[str, str]:
    """Linears that are never quantized unless a target names them, with the rule."""
    protected = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, linear in linears.items():
        if linear is head:
            protected[name] = "output embeddings"
    for experts_name, module in experts.items():
        block = experts_name.rpartition(".")[0]
        shape, _ = experts_shape(experts_name, module)
        for name, linear in linears.items():
            inside = name.startswith(f"{block}.") if block else True
            if inside and linear.out_features in (1, shape.num_experts):
                protected[name] = "router"
    return protected


def _why(config: OnlineQuantizationConfig, name: str, kind: str) -> str:
    if config.is_ignored(name):
        return "ignored by pattern"
    return "no target matches" if config.targets else f"the scheme leaves {kind} layers alone"


def _has_weights(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values()) or is_experts(module)
