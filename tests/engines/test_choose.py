"""`auto`: what it chooses fits, and is as good as anything of its size, measured."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import torch

from moeq import OnlineQuantizationConfig
from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import read_headers
from moeq.embedded import held_out_text, model_folder
from moeq.engines.choose import (
    Errors,
    choose_mixture,
    layer_options,
    mixture_config,
    output_errors,
    weight_errors,
)
from moeq.engines.evaluate import evaluate
from moeq.engines.load import empty_model, load_tokenizer
from moeq.engines.planning import cache_bytes, plan_load
from moeq.errors import ConfigError
from moeq.fidelity.choose import choose
from moeq.schemes import OnlineQuantScheme
from tests.engines.tools import FP8, INT8

CPU = torch.device("cpu")
CONFIGS = {scheme.value: OnlineQuantizationConfig(scheme) for scheme in OnlineQuantScheme}


def ids(tokens: int) -> torch.Tensor:
    tokenizer = load_tokenizer(model_folder())
    return torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"][:tokens])


@functools.cache
def errors_by(judge: str) -> Errors:
    if judge == "weights":
        return weight_errors(model_folder(), CONFIGS, CPU)
    return output_errors(model_folder(), CONFIGS, ids(2048), CPU)


def test_errors_of_weights_are_those_of_an_evaluation() -> None:
    found = evaluate(model_folder(), CONFIGS, ids(512))
    errors = errors_by("weights")
    checked = 0
    for scheme in found.schemes:
        for layer in scheme.layers:
            mean = sum(e**2 for e in layer.weight_error) / len(layer.weight_error)
            key = layer.name, OnlineQuantScheme(layer.scheme)
            assert errors[key] == pytest.approx(mean**0.5, rel=1e-9)
            checked += 1
    assert checked == len(errors)


@pytest.mark.parametrize("judge", ["weights", "text"])
def test_is_as_good_as_any_scheme_of_its_size(judge: str) -> None:
    """In KL, on text that judged nothing: at the least that fits, where linears are quantized for
    it, and with room for some layers as they are."""
    folder = model_folder()
    empty, specs = empty_model(folder), read_headers(checkpoint_files(folder))
    options = layer_options(empty, specs, CONFIGS, errors_by(judge))
    sizes = {n: plan_load(empty, specs, c, [CPU])[0].final_bytes for n, c in CONFIGS.items()}
    original = sum(spec.nbytes for spec in specs.values())
    rest = original - sum(mine[0].nbytes for mine in options.values())
    budgets = (min(sizes.values()) + 50_000, sizes["int8_per_channel"], sizes[INT8] + 2_500_000)
    mixtures = {}
    for budget in budgets:
        choice = choose(options, budget - rest)
        assert choice is not None
        mixtures[f"auto {budget}"] = mixture_config(choice, CONFIGS)
    found = evaluate(folder, CONFIGS | mixtures, ids(6144)[2048:]).schemes
    kl = {each.scheme: each.fidelity.kl.mean.value for each in found}
    for budget, name in zip(budgets, mixtures, strict=True):
        (mine,) = (each for each in found if each.scheme == name)
        assert mine.bytes <= budget
        singles = {single: kl[single] for single in CONFIGS if sizes[single] <= budget}
        assert kl[name] <= min(singles.values()), (budget, singles, kl[name])
    assert len(set(mixtures.values())) == 3


def test_room_is_used() -> None:
    def error(budget: int) -> float:
        return choose_mixture(
            model_folder(), CONFIGS, errors_by("weights"), memory=budget, context=1, device=CPU
        ).error

    found = [error(budget) for budget in (11_200_000, 12_000_000, 13_500_000, 15_000_000)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("memory", "message"),
    [(5_000_000, "nothing fits: the least .* needs 6.* there is 5.0 MB"),
     (40_000_000, "the unquantized model fits")],
)  # fmt: skip
def test_when_there_is_nothing_to_choose(memory: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_mixture(
            model_folder(), CONFIGS, errors_by("weights"), memory=memory, context=1, device=CPU
        )


def test_patterns_and_kinds_hold_for_mixtures_too(tmp_path: Path) -> None:
    configs = {
        name: OnlineQuantizationConfig(name, linear="none", ignore=["model.layers.0.*"])
        for name in (INT8, FP8)
    }
    errors = weight_errors(model_folder(), configs, CPU)
    found = choose_mixture(
        model_folder(), configs, errors, memory=14_000_000, context=1, device=CPU
    )
    assert set(found.choice) == {f"model.layers.{i}.mlp.experts" for i in range(1, 5)}


def test_a_byte_less_than_a_choice_needs_is_another_choice() -> None:
    """And found at once: the search used to come nearer by a byte at a time."""
    empty, specs = empty_model(model_folder()), read_headers(checkpoint_files(model_folder()))
    errors = errors_by("weights")
    for config in CONFIGS.values():
        (plan,) = plan_load(empty, specs, config, [CPU])
        memory = max(plan.peak_bytes, plan.final_bytes + (cache_bytes(empty, 1) or 0)) - 1
        found = None
        with contextlib.suppress(ConfigError):  # nothing else may be as small
            found = choose_mixture(
                model_folder(), CONFIGS, errors, memory=memory, context=1, device=CPU
            )
        assert found is None or found.need <= memory
