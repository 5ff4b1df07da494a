"""The custom ops hold under torch.compile: their fakes are right, and nothing breaks the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq import ops
from moeq.experts import code_columns, group_shape, scale_shape
from moeq.methods.linear import OnlineLinearMethod
from moeq.schemes import OnlineQuantScheme
from tests.methods.moe import arrive, checkpoint, created, routing

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu"])
ONE = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
T, H, I, E = 3, 20, 12, 4  # noqa: E741


@pytest.fixture(autouse=True)
def forgetful_dynamo() -> Iterator[None]:
    """Guards of one test must not decide whether another recompiles."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def codes(
    scheme: OnlineQuantScheme, *shape: int, parts: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((*shape[:-1], code_columns(scheme, shape[-1])), generator=generator)
    scale = torch.full(scale_shape(scheme.granularity, shape, parts), 0.01)
    grouped = group_shape(scheme, shape)
    if grouped is None:
        return weight.mul(30).clamp(-127, 127).to(scheme.weight_dtype), scale, None
    group = torch.randint(8, 127, grouped, generator=generator, dtype=torch.uint8)
    return weight.mul(40).add(128).clamp(0, 255).byte(), scale, group.view(scheme.group_dtype)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def fused_arguments(
    scheme: OnlineQuantScheme, backend: str, x: Tensor, *, has_bias: bool = True
) -> tuple[Any, ...]:
    b13, b2 = (rows(E, 2 * I), rows(E, H)) if has_bias else (None, None)
    w13, w13_scale, w13_group = codes(scheme, E, 2 * I, H, parts=2)
    w2, w2_scale, w2_group = codes(scheme, E, H, I)
    weights = (w13, w13_scale, w2, w2_scale, b13, b2, w13_group, w2_group, 2)
    return (x, *routing(x.shape[0], E), *weights, scheme.value, "silu", backend)


def opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """`torch.library.opcheck`, whose check of mutation cannot compare fp8 tensors: ours can."""
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if all(tensor.dtype.itemsize > 1 or not tensor.is_floating_point() for tensor in tensors):
        checks.append("test_schema")
    before = [tensor.double() for tensor in tensors]
    torch.library.opcheck(op, arguments, test_utils=checks)
    for tensor, values in zip(tensors, before, strict=True):
        assert torch.equal(tensor.double(), values)


@EVERY_BACKEND
@EVERY_SCHEME
@pytest.mark.parametrize("has_bias", [False, True])
def test_fused_experts_passes_opcheck(
    scheme: OnlineQuantScheme, has_bias: bool, backend: str
) -> None:
    arguments = fused_arguments(scheme, backend, rows(T, H), has_bias=has_bias)
    opcheck(ops.fused_experts, arguments)


@EVERY_BACKEND
@EVERY_SCHEME
@pytest.mark.parametrize("each", [1, 2])
def test_expert_linear_passes_opcheck(scheme: OnlineQuantScheme, each: int, backend: str) -> None:
    weight = codes(scheme, E, 2 * I, H, parts=2)
    ids, _ = routing(T, E)
    arguments = (rows(T, each, H), ids, *weight, rows(E, 2 * I), scheme.value, 2, backend)
    opcheck(ops.expert_linear, arguments)


@EVERY_BACKEND
@pytest.mark.parametrize("scheme", [s for s in OnlineQuantScheme if s.covers("linear")], ids=str)
@pytest.mark.parametrize("shape", [(H,), (T, H), (2, T, H)])
def test_linear_passes_opcheck(
    scheme: OnlineQuantScheme, shape: tuple[int, ...], backend: str
) -> None:
    arguments = (rows(*shape), *codes(scheme, I, H), rows(I), scheme.value, backend)
    opcheck(ops.linear, arguments)


@EVERY_BACKEND
def test_fakes_have_the_strides_of_results_whatever_those_of_the_inputs(backend: str) -> None:
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL
    x = rows(H, T, dtype=torch.float32).t()
    assert not x.is_contiguous()
    opcheck(ops.fused_experts, fused_arguments(scheme, backend, x))
    ids, _ = routing(T, E)
    weight = codes(scheme, E, I, H)
    opcheck(ops.expert_linear, (x[:, None], ids, *weight, None, scheme.value, 1, backend))
    opcheck(ops.linear, (x, *codes(scheme, I, H), None, scheme.value, backend))


@EVERY_BACKEND
def test_no_tokens_pass_opcheck(backend: str) -> None:
    opcheck(ops.fused_experts, fused_arguments(ONE, backend, rows(0, H)))


def double_gate(h13: Tensor) -> Tensor:
    gate, up = h13.chunk(2, dim=-1)
    return torch.sigmoid(gate).clamp(max=0.9) * up


class Layer(nn.Module):
    """What an engine makes of a method: a module whose forward is `apply`."""

    def __init__(self, backend: str, *, own_gate: bool, scheme: OnlineQuantScheme = ONE) -> None:
        super().__init__()
        model = checkpoint(E, H, I, has_bias=True)
        self.method, layer = created(model, scheme, backend=backend)
        arrive(self.method, layer, model)
        how: dict[str, Any] = {"gate": double_gate} if own_gate else {"activation": "silu"}
        self.method.process_weights_after_loading(layer, **how)
        for name, value in layer._parameters.items():
            self.register_parameter(name, value)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.method.apply(self, x * 2, ids, weights) + 1


@EVERY_BACKEND
@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", [ONE, INT4], ids=lambda scheme: scheme.value)
def test_a_moe_layer_compiles_without_a_graph_break(
    compiler: str, own_gate: bool, backend: str, scheme: OnlineQuantScheme
) -> None:
    layer = Layer(backend, own_gate=own_gate, scheme=scheme)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    with torch.inference_mode():
        for tokens in (5, 7, 2):  # the number of tokens becomes dynamic
            x = rows(tokens, H)
            ids, weights = routing(tokens, E, seed=tokens)
            assert torch.equal(compiled(x, ids, weights), layer(x, ids, weights))


@EVERY_BACKEND
def test_one_graph_serves_any_number_of_tokens(backend: str) -> None:
    layer = Layer(backend, own_gate=False)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (5, 7, 2, 31):
            compiled(rows(tokens, H), *routing(tokens, E))
    assert graphs.frame_count == 1


@EVERY_BACKEND
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", [OnlineQuantScheme.FP8_PER_BLOCK, INT4], ids=str)
def test_a_linear_compiles_without_a_graph_break(
    compiler: str, backend: str, scheme: OnlineQuantScheme
) -> None:
    method, layer = OnlineLinearMethod(scheme, backend=backend), nn.Module()
    method.create_weights(layer, in_features=H, out_features=I, dtype=torch.bfloat16)
    method.load(layer, rows(I, H), "w", torch.device("cpu"))
    method.process_weights_after_loading(layer)

    def forward(x: Tensor) -> Tensor:
        return method.apply(layer, x.relu(), None) * 2

    compiled = torch.compile(forward, backend=compiler, fullgraph=True)
    with torch.inference_mode():
        for shape in ((2, 5, H), (2, 3, H)):
            assert torch.equal(compiled(rows(*shape)), forward(rows(*shape)))
