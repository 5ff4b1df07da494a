"""Models whose codes are arranged for the CPU: saved, refreshed, copied and moved as any other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moeq
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_modules import order_of_files
from moeq.engines.offline import quantize_checkpoint
from moeq.errors import ModelError, RefreshError
from moeq.kernels import cpu_int4
from moeq.methods import parameters
from moeq.methods.parameters import has_arranged
from tests.engines.tools import assert_same_state

pytestmark = pytest.mark.skipif(
    cpu_int4._block_rows() == 0, reason="PyTorch's operator is of no known layout on this CPU"
)

CONFIG = {"moe": "int4_per_group_weight_only", "linear": "int4_per_group_weight_only"}


def checkpoint(folder: Path, seed: int) -> Path:
    """Large enough for whole blocks of 64 rows; the key and value projections are not."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("old"), 1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("new"), 2)


def load(folder: Path) -> Any:
    return moeq.load(folder, OnlineQuantizationConfig(**CONFIG))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(12)[None]).logits
    return found


def arranged_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if has_arranged(module)]


def files(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def test_what_can_be_arranged_is_and_the_model_says_the_same(old: Path) -> None:
    model = load(old)
    layers = arranged_layers(model)
    assert [name for name in layers if name.endswith("experts")] == [
        f"model.layers.{i}.mlp.experts" for i in range(2)
    ]
    assert "model.layers.0.self_attn.q_proj" in layers
    assert "model.layers.0.self_attn.k_proj" not in layers
    found = logits(model)
    with order_of_files(model):
        assert arranged_layers(model) == []
        torch.testing.assert_close(logits(model), found, rtol=0, atol=0.03)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state["model.layers.0.mlp.experts.w13_codes"].dtype == torch.uint8
    assert arranged_layers(model) == layers
    assert torch.equal(logits(model), found)


def test_saved_after_running_it_is_what_offline_quantizing_writes(
    old: Path, tmp_path: Path
) -> None:
    model = load(old)
    before = logits(model)
    moeq.save(model, tmp_path / "saved")
    quantize_checkpoint(old, OnlineQuantizationConfig(**CONFIG), tmp_path / "offline")
    ours, theirs = files(tmp_path / "saved"), files(tmp_path / "offline")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert torch.equal(logits(model), before)
    again = moeq.load(tmp_path / "saved")
    assert arranged_layers(again) == arranged_layers(model)
    assert torch.equal(logits(again), before)
    assert_same_state(again, model)
    assert files(tmp_path / "saved").keys() == ours.keys()  # nobody wrote to the mapped file
    for name, tensor in files(tmp_path / "saved").items():
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name


def test_refreshed_while_it_runs(old: Path, new: Path) -> None:
    model = load(old)
    address = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(files(new).items()):
            yield pair
            if index == 3:
                assert torch.isfinite(logits(model)).all()

    moeq.refresh(model, arriving())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == address
    assert_same_state(model, load(new))


def test_a_refresh_that_fails_leaves_the_model_arranged(old: Path, new: Path) -> None:
    model = load(old)
    before, layers, tensors = logits(model), arranged_layers(model), files(new)
    first = next(iter(tensors))
    with pytest.raises(RefreshError, match="twice"):
        moeq.refresh(model, [(name, tensors[name]) for name in (first, first)])
    assert arranged_layers(model) == layers
    moeq.refresh(model, files(old))
    assert torch.equal(logits(model), before)
    moeq.refresh(model, tensors)
    assert_same_state(model, load(new))


def test_a_copy_is_arranged_too_and_lives_its_own_life(old: Path, new: Path) -> None:
    model = load(old)
    before = logits(model)
    other = copy.deepcopy(model)
    assert_same_state(other, model)
    moeq.refresh(other, files(new))
    assert torch.equal(logits(model), before)
    assert_same_state(other, load(new))


def test_weights_that_are_read_are_those_of_files(old: Path) -> None:
    model = load(old)
    linear = model.model.layers[0].self_attn.q_proj
    experts = model.model.layers[0].mlp.experts
    weight, pair = linear.weight, experts._moeq_method.dequantized(experts, 2)
    held = experts._moeq_method.weights(experts)
    assert held.w13.dtype == torch.uint8
    with order_of_files(model):
        assert torch.equal(linear.weight, weight)
        for found, expected in zip(experts._moeq_method.dequantized(experts, 2), pair, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(experts._moeq_method.weights(experts).w13, held.w13)
    original = files(old)["model.layers.0.self_attn.q_proj.weight"].float()
    assert (weight.float() - original).norm() < 0.12 * original.norm()


def test_other_devices_are_refused(old: Path) -> None:
    model = load(old)
    before = logits(model)
    layer = model.model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp.experts):
        with pytest.raises(ModelError, match="arranged for cpu"):
            module.to("meta")
    assert torch.equal(logits(model.to("cpu")), before)


def test_an_interruption_is_not_read_as_weights(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(old)

    def interrupt(*args: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parameters.cpu_int4, "restore", interrupt)
    with pytest.raises((KeyboardInterrupt, ModelError)), order_of_files(model):
        pass
    monkeypatch.undo()
    with pytest.raises(ModelError, match="was interrupted"):
        moeq.refresh(model, files(old))
    with pytest.raises((RuntimeError, AssertionError)):
        logits(model)


def test_without_a_known_layout_nothing_is_arranged(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load(old))
    monkeypatch.setattr(cpu_int4, "_block_rows", lambda: 0)
    model = load(old)
    assert arranged_layers(model) == []
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.03)
