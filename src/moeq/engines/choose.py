"""`moeq plan --quantization auto`: a scheme for every layer, by what each costs there.

The error of a layer under a scheme is measured: without a text it is that of its weights, from the
same stream as a load; with one it is that of its outputs on the original's inputs (`evaluate`),
which knows of activations too. `moeq.fidelity.choose` then finds what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import TensorSpec
from moeq.checkpoint.published import read_specs
from moeq.config import OnlineQuantizationConfig
from moeq.engines.evaluate import evaluate
from moeq.engines.hf_deferred import load_deferred, read_experts
from moeq.engines.hf_layers import quantize_experts, quantize_linear
from moeq.engines.load import empty_model
from moeq.engines.planning import cache_bytes, decision_for, plan_load
from moeq.errors import ConfigError
from moeq.fidelity.choose import Choice, Option, choose, total_bytes, total_error
from moeq.plan import LoadPlan
from moeq.report import size
from moeq.schemes import OnlineQuantScheme

Progress = Callable[[int, int], None]

Errors = dict[tuple[str, OnlineQuantScheme], float]
"""(layer, scheme) -> relative error."""


@dataclass(frozen=True)
class Mixture:
    """What was chosen.

    Attributes:
        config: that every command and engine takes.
        choice: by layer.
        plan: of a load under it.
        need: bytes, the more of loading and of running with the cache.
        error: of all layers, root of the summed squares.
    """

    config: OnlineQuantizationConfig
    choice: Choice
    plan: LoadPlan
    need: int
    error: float


def weight_errors(
    folder: Path,
    configs: Mapping[str, OnlineQuantizationConfig],
    device: torch.device,
    progress: Progress | None = None,
) -> Errors:
    """|W' - W| / |W| of every layer under every config's scheme; of experts, their mean square's
    root."""
    errors: Errors = {}
    with torch.no_grad():
        deferred = load_deferred(folder, list(configs.values()), device)
        dtype = deferred.model.dtype
        wanted = {
            name: layer
            for name, layer in deferred.experts.items()
            if any(config.scheme_for(name, "moe") for config in configs.values())
        }
        total = sum(plan.source_bytes for _, plan in wanted.values())
        read = 0

        def advance(nbytes: int) -> None:
            nonlocal read
            read += nbytes
            if progress is not None:
                progress(read, total)

        for config, decision in zip(configs.values(), deferred.decisions, strict=True):
            for target in decision.targets:
                name, key = target.shape.name, (target.shape.name, target.scheme)
                if target.shape.kind == "linear" and key not in errors:
                    module = deferred.model.get_submodule(name)
                    (errors[key],) = quantize_linear(config, target, module, dtype).weight_errors
        for name, (target, plan) in wanted.items():
            experts = read_experts(target, plan, device, advance)
            for config in configs.values():
                scheme = config.scheme_for(name, "moe")
                if scheme is not None and (name, scheme) not in errors:
                    found = quantize_experts(config, target, experts, dtype).weight_errors
                    errors[name, scheme] = (sum(e**2 for e in found) / len(found)) ** 0.5
    return errors


def output_errors(
    folder: Path,
    configs: Mapping[str, OnlineQuantizationConfig],
    ids: Tensor,
    device: torch.device,
    progress: Progress | None = None,
) -> Errors:
    """|y' - y| / |y| of every layer under every config's scheme, on a text."""
    found = evaluate(folder, configs, ids, device=str(device), progress=progress)
    return {
        (layer.name, OnlineQuantScheme(layer.scheme)): layer.output_error
        for scheme in found.schemes
        for layer in scheme.layers
    }


def choose_mixture(
    folder: Path,
    configs: Mapping[str, OnlineQuantizationConfig],
    errors: Errors,
    *,
    memory: int,
    context: int,
    device: torch.device,
) -> Mixture:
    """The scheme of every layer with which a model fits and errs least.

    Args:
        folder: of the original checkpoint.
        configs: whose schemes are the options, by layer.
        errors: of them.
        memory: bytes that there are for weights, loading, and the cache.
        context: tokens of the cache.
        device: where the model is to run; it need not be there.

    Raises:
        ConfigError: nothing fits; says what is missing.
    """
    empty = empty_model(folder)
    specs = read_specs(checkpoint_files(folder))
    cache = cache_bytes(empty, context) or 0
    options = layer_options(empty, specs, configs, errors)
    original = sum(mine[0].nbytes for mine in options.values())
    rest = sum(spec.held_bytes for spec in specs.values()) - original
    # Loading takes a window beyond the weights, which is known only once the schemes are
    spare = cache
    while True:
        choice = choose(options, memory - rest - spare)
        if choice is None:
            least = sum(min(o.nbytes for o in mine) for mine in options.values())
            raise ConfigError(
                f"nothing fits: the least that these schemes make of it needs"
                f" {size(rest + least + spare)}, there is {size(memory)}",
                hint="more --memory, a shorter --context, or a smaller model",
            )
        if all(option.scheme is None for option in choice.values()):
            raise ConfigError(
                f"the unquantized model fits: {size(rest + original + spare)} of {size(memory)}",
                hint="load it as it is, or name less --memory",
            )
        config = mixture_config(choice, configs)
        (plan,) = plan_load(empty, specs, config, [device])
        need = max(plan.peak_bytes, plan.final_bytes + cache)
        if need <= memory:
            return Mixture(config, choice, plan, need, total_error(choice))
        # At least to another choice: this one would come again for every byte that it spares
        spare = max(spare + need - memory, memory - rest - total_bytes(choice) + 1)


def layer_options(
    empty: Any,
    specs: Mapping[str, TensorSpec],
    configs: Mapping[str, OnlineQuantizationConfig],
    errors: Errors,
) -> dict[str, list[Option]]:
    """Every layer that a config quantizes: as it is, then under the schemes that errors are known
    of; among equals first those that leave activations alone."""
    options: dict[str, list[Option]] = {}
    for config in configs.values():
        for layer in decision_for(empty, specs, config).routes.plans:
            name, scheme = layer.shape.name, layer.scheme
            mine = options.setdefault(name, [Option(None, layer.original_bytes, 0.0)])
            if (name, scheme) in errors and all(o.scheme is not scheme for o in mine):
                mine.append(Option(scheme, layer.final_bytes, errors[name, scheme]))
    for mine in options.values():
        mine.sort(key=lambda o: o.scheme is not None and 1 + o.scheme.quantizes_activations)
    return options


def mixture_config(
    choice: Choice, configs: Mapping[str, OnlineQuantizationConfig]
) -> OnlineQuantizationConfig:
    """A choice as a config, as strict as those that it is made of."""
    targets = {name: option.scheme for name, option in choice.items() if option.scheme is not None}
    strict = all(config.strict for config in configs.values())
    return OnlineQuantizationConfig(targets=targets, strict=strict)
