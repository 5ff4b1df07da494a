"""Finding what to quantize in a transformers model, by structure and never by its name.

About 64 model families of transformers share one decorator for their experts modules,
`use_experts_implementation` in `transformers.integrations.moe` (read at 5.17 and 5.23); it leaves
attributes that say how a module lays out its weights. Whatever else holds experts is found too, to
be refused by name: no experts stay in bf16 without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.config import OnlineQuantizationConfig, matches
from moeq.errors import CheckpointError, ModelError, PatternError
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

_TIED = "shares its weight with another layer"

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
    foreign = _foreign_experts(model, modules, experts)
    config.check_patterns(
        [name for name, m in modules.items() if name and (_has_weights(m) or name in foreign)]
    )
    _refuse_foreign_experts(model, foreign, experts, config)
    protected = _protected_linears(model, modules, experts, linears)
    targets, kept = [], {name: _why(config, name, "moe") for name in foreign}
    for outer, reason in kept.items():
        protected |= {name: reason for name in linears if name.startswith(f"{outer}.")}

    for name, module in experts.items():
        _check_top_k(name, module)
        scheme = config.scheme_for(name, "moe")
        if scheme is None:
            kept[name] = _why(config, name, "moe")
        else:
            shape, up_name = experts_shape(name, module)
            targets.append(Target(module, shape, scheme, up_name))
    for name, module in modules.items():
        subclass = isinstance(module, nn.Linear) and name not in linears
        if subclass and config.scheme_for(name, "linear") is not None:
            kept[name] = "a kind of linear that moeq does not know"
    for name, linear in linears.items():
        scheme = config.scheme_for(name, "linear")
        if name in config.targets and protected.get(name) == _TIED:
            raise ModelError(f"{name}: {_TIED}, which would no longer be the same")
        if name in protected and name not in config.targets:
            kept[name] = protected[name]
        elif scheme is None:
            kept[name] = _why(config, name, "linear")
        else:
            shape = LayerShape(name, "linear", 1, linear.in_features, linear.out_features)
            targets.append(Target(linear, shape, scheme, "weight"))
    for pattern in config.targets:
        if not any(matches(pattern, target.shape.name) for target in targets):
            raise PatternError(
                f"target {pattern!r} matches no layer that can be quantized",
                hint="experts and nn.Linear layers can; routers and heads by their exact name",
            )
    return targets, kept


def _check_top_k(name: str, module: Any) -> None:
    """That every token can find as many experts as the config promises it."""
    top_k = getattr(module.config, "num_experts_per_tok", None)
    shape, _ = experts_shape(name, module)
    if isinstance(top_k, int) and not 1 <= top_k <= shape.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {top_k}, {name} has {shape.num_experts} experts",
            hint=f"expected 1 to {shape.num_experts}; get the model's own config.json",
        )


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


def expert_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of any module that holds experts, without their biases."""
    parameters = list(module.parameters())
    stacked = [p for p in parameters if p.ndim == 3]
    return stacked or [p for p in parameters if p.ndim == 2]


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


def _foreign_experts(
    model: Any, modules: dict[str, nn.Module], experts: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Whatever else holds experts. Where nothing does by its structure, names have to do (Dbrx
    stacks its experts in 2-D)."""
    counts = set(_expert_counts(getattr(model, "config", None)))
    others = {name: module for name, module in modules.items() if name not in experts}
    foreign = {name: m for name, m in others.items() if _looks_like_experts(m, counts)}
    if not experts and not foreign:
        for name, module in others.items():
            inside = name.startswith(tuple(f"{outer}." for outer in foreign))
            if "expert" in type(module).__name__.lower() and not inside:
                foreign[name] = module
    return foreign


def _refuse_foreign_experts(
    model: nn.Module,
    foreign: dict[str, nn.Module],
    experts: dict[str, nn.Module],
    config: OnlineQuantizationConfig,
) -> None:
    for name, module in foreign.items():
        if config.scheme_for(name, "moe") is not None:
            raise ModelError(
                f"{name} ({type(module).__name__}) holds experts in a layout that moeq does"
                " not quantize",
                hint=f"to leave them unquantized on purpose, add {name!r} to ignore",
            )
    if config.moe is not None and not experts and not foreign:
        raise ModelError(
            f"{type(model).__name__} has no experts that moeq knows",
            hint='moeq is for Mixture-of-Experts models; for its linears alone set moe to "none"',
        )


def _looks_like_experts(module: nn.Module, counts: set[int]) -> bool:
    """Stacked matrices, or a list, of as many as there are experts. One matrix alone has to be
    called so too: position embeddings [64, 64, H] of a vision tower are no experts."""
    called = "expert" in " ".join(type(m).__name__.lower() for m in (module, *module.children()))
    stacked = [
        p
        for p in module._parameters.values()
        if p is not None and p.ndim == 3 and p.shape[0] in counts and min(p.shape[1:]) > 1
    ]
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) in counts
    return len(stacked) > 1 or (called and (len(stacked) == 1 or is_list))


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
    model: Any,
    modules: dict[str, nn.Module],
    experts: dict[str, nn.Module],
    linears: dict[str, nn.Linear],
) -> dict[str, str]:
    """Linears that are never quantized unless a target names them, with the rule."""
    protected = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*tied, *tied.values()}
    fp32 = fp32_patterns(model)
    routers = tuple(f"{name}." for name in _recorded_routers(modules, experts))
    for name, linear in linears.items():
        if f"{name}.weight" in tied:
            protected[name] = _TIED
        elif linear is head:
            protected[name] = "output embeddings"
        elif f"{name}.".startswith(routers):
            protected[name] = "router"
        elif any(re.search(pattern, f"{name}.weight") for pattern in fp32):
            protected[name] = "transformers keeps it in fp32"
    for experts_name, module in experts.items():
        block = experts_name.rpartition(".")[0]
        shape, _ = experts_shape(experts_name, module)
        for name, linear in linears.items():
            inside = name.startswith(f"{block}.") if block else True
            if inside and linear.out_features in (1, shape.num_experts):
                protected[name] = "router"
    return protected


def _recorded_routers(
    modules: dict[str, nn.Module], experts: dict[str, nn.Module]
) -> Iterator[str]:
    """Modules whose outputs a model declares to be router logits. A router can be an MLP, or have
    an output more than there are experts (Zaya). Some declare the whole MoE block: not those."""
    for model in modules.values():
        declared: Any = getattr(model, "_can_record_outputs", None) or {}
        recorders = declared.get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
            kind = getattr(recorder, "target_class", recorder)
            place = f".{getattr(recorder, 'layer_name', None) or ''}.".replace("..", ".")
            if not isinstance(kind, type):
                continue
            for name, module in modules.items():
                if not isinstance(module, kind) or place not in f".{name}.":
                    continue
                if not any(inner.startswith(f"{name}.") for inner in experts):
                    yield name


def fp32_patterns(model: Any) -> set[str]:
    """Regular expressions for what transformers does not even load in half precision."""
    patterns: set[str] = set()
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        patterns.update(getattr(model, name, None) or ())
    return {pattern.replace("*", ".*") for pattern in patterns}


def _why(config: OnlineQuantizationConfig, name: str, kind: str) -> str:
    if config.is_ignored(name):
        return "ignored by pattern"
    return "no target matches" if config.targets else f"{kind} not covered"


def _has_weights(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values()) or is_experts(module)
