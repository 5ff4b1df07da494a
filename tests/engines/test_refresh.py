"""New weights in place: the bytes of a fresh load, at the addresses of the old one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moeq
from moeq.errors import ModelError, RefreshError
from moeq.schemes import OnlineQuantScheme
from tests.engines.models import ARCHITECTURES, BY_NAME, Architecture
from tests.engines.tools import EXPERT_WEIGHT, FP8, INT8, QWEN, assert_same_state, load

MERGED = ("minimax_m3_vl", "kimi_k25", "bailing_hybrid", "kimi_linear")
"""transformers builds tensors of theirs, outside of experts, of several in the checkpoint."""


def saved(architecture: Architecture, folder: Path, seed: int, **options: Any) -> Path:
    model = architecture.make().to(torch.bfloat16)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder, **options)
    return folder


def tensors_of(folder: Path) -> list[tuple[str, Tensor]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return list(found.items())


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_a_refreshed_model_is_the_one_that_loads_the_new_weights(
    architecture: Architecture, fused: bool, tmp_path: Path
) -> None:
    old = saved(architecture, tmp_path / "old", 1)
    new = saved(architecture, tmp_path / "new", 2, save_original_format=not fused)
    model = load(old, architecture, INT8)
    with pytest.raises(AssertionError):
        assert_same_state(model, load(new, architecture, INT8))
    before = addresses(model)
    arriving = tensors_of(new)
    random.Random(0).shuffle(arriving)
    if architecture.name in MERGED and not fused:
        with pytest.raises(RefreshError, match=r"builds .* of several tensors"):
            moeq.refresh(model, iter(arriving))
        return
    report = moeq.refresh(model, iter(arriving))
    assert report.tensors == len(arriving)
    assert report.nbytes == sum(tensor.nbytes for _, tensor in arriving)
    assert addresses(model) == before
    assert_same_state(model, load(new, architecture, INT8))


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_every_scheme_again_and_again(scheme: OnlineQuantScheme, tmp_path: Path) -> None:
    folders = [saved(QWEN, tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    model = load(folders[0], QWEN, scheme.value)
    before = addresses(model)
    for folder in (folders[1], folders[2], folders[1]):
        moeq.refresh(model, dict(tensors_of(folder)))
        assert addresses(model) == before
        assert_same_state(model, load(folder, QWEN, scheme.value))


def test_a_model_that_moeq_saved_takes_new_weights_too(tmp_path: Path) -> None:
    old, new = (saved(QWEN, tmp_path / str(seed), seed) for seed in (1, 2))
    moeq.save(load(old, QWEN, FP8), tmp_path / "quantized")
    model = moeq.load(tmp_path / "quantized")
    moeq.refresh(model, tensors_of(new))
    assert_same_state(model, load(new, QWEN, FP8))


@pytest.fixture
def refreshing(tmp_path: Path) -> tuple[Any, list[tuple[str, Tensor]], Any]:
    """A model, new weights for it, and the model that they make."""
    old, new = (saved(QWEN, tmp_path / str(seed), seed) for seed in (1, 2))
    return load(old, QWEN, FP8), tensors_of(new), load(new, QWEN, FP8)


Change = Callable[[list[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]


def without(name: str) -> Change:
    return lambda tensors: (pair for pair in tensors if pair[0] != name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: ((n, change(t) if n == name else t) for n, t in tensors)


def nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[5] = float("nan")
    return tensor


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EXPERT_WEIGHT), "1 expert tensors never arrived, the first: gate of expert 3"),
        (without(NORM), f"missing from the checkpoint: {NORM}"),
        (lambda t: iter([*t, t[0]]), "came twice"),
        (lambda t: iter([*t, ("norm.weight", dict(t)[NORM])]), "came before, under another name"),
        (lambda t: iter([*t, ("model.surprise", t[0][1])]), "'model.surprise' is no tensor of"),
        (changed(EXPERT_WEIGHT, lambda t: t[:-1]), "expected"),
        (changed(NORM, lambda t: t[:-1]), "expected"),
        (changed(EXPERT_WEIGHT, lambda t: t.to(torch.int8)), "dtype torch.int8"),
        (changed(NORM, lambda t: t.to(torch.int8)), "dtype torch.int8, expected torch.bfloat16"),
        (changed(EXPERT_WEIGHT, nan), "nan at"),
        (lambda t: iter([]), "0 tensors are new"),
    ],
)
def test_bad_input_is_told_and_the_next_refresh_mends_it(
    change: Change, message: str, refreshing: tuple[Any, list[tuple[str, Tensor]], Any]
) -> None:
    model, tensors, expected = refreshing
    with pytest.raises(RefreshError, match=message) as caught:
        moeq.refresh(model, change(tensors))
    assert "mixes new and old weights" in str(caught.value)
    ids = torch.arange(9)[None]
    assert bool(torch.isfinite(model(ids).logits).all())  # it still runs
    moeq.refresh(model, tensors)
    assert_same_state(model, expected)


def test_an_error_of_the_iterator_passes_through(
    refreshing: tuple[Any, list[tuple[str, Tensor]], Any],
) -> None:
    model, tensors, expected = refreshing

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield tensors[0]
        raise ConnectionError("the trainer went away")

    with pytest.raises(ConnectionError):
        moeq.refresh(model, broken())
    moeq.refresh(model, tensors)
    assert_same_state(model, expected)


def test_a_buffer_that_is_used_again_is_found_out(
    refreshing: tuple[Any, list[tuple[str, Tensor]], Any],
) -> None:
    model, tensors, expected = refreshing
    shape = dict(tensors)[EXPERT_WEIGHT].shape
    buffer = torch.empty(shape, dtype=torch.bfloat16)

    def through_one_buffer() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, buffer.copy_(tensor) if tensor.shape == shape else tensor

    with pytest.raises(RefreshError, match="was written to before it was read"):
        moeq.refresh(model, through_one_buffer())
    with torch.inference_mode():
        moeq.refresh(model, [(name, tensor.clone()) for name, tensor in tensors])
    assert_same_state(model, expected)


def test_copies_of_a_model_are_refreshed_apart(
    refreshing: tuple[Any, list[tuple[str, Tensor]], Any],
) -> None:
    model, tensors, expected = refreshing
    twin = copy.deepcopy(model)
    moeq.refresh(twin, tensors)
    assert_same_state(twin, expected)
    assert not torch.equal(model.model.norm.weight, twin.model.norm.weight)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not quantized by moeq"):
        moeq.refresh(BY_NAME["qwen2_moe"].make(), [])
