"""Loading onto a GPU: the bytes of a load onto the CPU, by other threads, kernels and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeq
from moeq.engines.hf_modules import order_of_files
from moeq.errors import NonFiniteError, RefreshError
from moeq.schemes import OnlineQuantScheme
from tests.engines.models import ARCHITECTURES, Architecture
from tests.engines.published import FP8_BLOCKS, MXFP4, Published
from tests.engines.test_refresh import addresses, nan, saved, tensors_of
from tests.engines.tools import (
    EXPERT_WEIGHT,
    FP8,
    INT4,
    INT8,
    QWEN,
    assert_same_state,
    load,
    rewrite,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(folder: Path, architecture: Architecture, scheme: Any) -> Any:
    return load(folder, architecture, scheme, device_map="cuda")


def assert_same_bytes(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"cuda"}
    with order_of_files(expected):
        assert_same_state(found.to("cpu"), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda row: row.name)
def test_every_architecture_is_the_one_that_a_cpu_loads(
    architecture: Architecture, fused: bool, tmp_path: Path
) -> None:
    folder = saved(architecture, tmp_path, 1, save_original_format=not fused)
    model = on_gpu(folder, architecture, INT8)
    assert_same_bytes(model, load(folder, architecture, INT8))


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_every_scheme_loads_and_refreshes_to_the_bytes_of_a_cpu(
    scheme: OnlineQuantScheme, tmp_path: Path
) -> None:
    old, new = (saved(QWEN, tmp_path / str(seed), seed) for seed in (1, 2))
    model = on_gpu(old, QWEN, scheme.value)
    before = addresses(model)
    arriving = tensors_of(new)
    # From both sides: a trainer's tensors may be on the GPU or not
    moved = [(name, t.cuda() if i % 2 else t) for i, (name, t) in enumerate(arriving)]
    moeq.refresh(model, moved)
    assert addresses(model) == before
    assert_same_bytes(model, load(new, QWEN, scheme.value))


@pytest.mark.parametrize("scheme", [FP8, INT4])
def test_what_was_saved_loads_onto_a_gpu(scheme: str, tmp_path: Path) -> None:
    folder = saved(QWEN, tmp_path / "bf16", 1)
    moeq.save(on_gpu(folder, QWEN, scheme), tmp_path / "quantized")
    model = moeq.load(tmp_path / "quantized", device="cuda")
    assert_same_bytes(model, load(folder, QWEN, scheme))


def test_a_captured_graph_sees_the_new_weights(tmp_path: Path) -> None:
    old, new = (saved(QWEN, tmp_path / str(seed), seed) for seed in (1, 2))
    model = on_gpu(old, QWEN, INT8)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(4, 32, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], device="cuda")
    weights = torch.rand(4, 2, device="cuda", dtype=torch.bfloat16)

    def layer() -> Tensor:
        out: Tensor = experts._moeq_method.apply(experts, x, ids, weights)
        return out

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    moeq.refresh(model, tensors_of(new))
    graph.replay()
    assert torch.equal(out, layer())


def test_values_that_are_not_finite_are_named_without_anyone_having_waited(tmp_path: Path) -> None:
    folder = saved(QWEN, tmp_path, 1)

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[EXPERT_WEIGHT] = nan(tensors[EXPERT_WEIGHT])

    tensors = tensors_of(folder)
    model = on_gpu(folder, QWEN, INT8)
    rewrite(folder, poison)
    with pytest.raises(NonFiniteError, match=rf"{EXPERT_WEIGHT}.*nan at"):
        on_gpu(folder, QWEN, INT8)
    with pytest.raises(RefreshError, match="NaN or Inf"):
        moeq.refresh(model, [(name, t.cuda()) for name, t in tensors_of(folder)])
    moeq.refresh(model, tensors)
    assert bool(torch.isfinite(model(torch.arange(9, device="cuda")[None]).logits).all())


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize("published", [MXFP4, FP8_BLOCKS], ids=["mxfp4", "fp8"])
def test_published_codes_are_decoded_there(
    published: Published, scheme: OnlineQuantScheme, tmp_path: Path
) -> None:
    """Experts, and linears that some schemes keep."""
    ours, theirs = published.write(tmp_path)
    assert_same_bytes(moeq.load(ours, scheme.value, device="cuda"), moeq.load(theirs, scheme.value))
