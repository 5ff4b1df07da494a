"""A loaded MoE layer at work: biases, expert parallelism, and the inputs that break kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeq.errors import CheckpointError
from moeq.methods.base import OnlineMoEMethodBase
from moeq.quantize import dequantize
from moeq.schemes import OnlineQuantScheme
from tests.methods.moe import Checkpoint, arrive, checkpoint, created, loaded, routing, stored

pytestmark = pytest.mark.parametrize("backend", ["reference", "cpu"])

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
ONE = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
FP32 = torch.float32
LOCAL = [4, 5, 6, 7]


def tokens(count: int, model: Checkpoint, dtype: torch.dtype = FP32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.hidden, generator=generator).to(dtype)


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_gated", [True, False])
def test_apply_stays_close_to_the_unquantized_layer(
    scheme: OnlineQuantScheme, is_gated: bool, dtype: torch.dtype, backend: str
) -> None:
    model = checkpoint(3, 150, 140, is_gated=is_gated, has_bias=True, dtype=dtype)
    method, layer = loaded(model, scheme, backend=backend)
    x = tokens(6, model, dtype)
    ids, weights = routing(6, 3)
    out = method.apply(layer, x, ids, weights)
    assert (out.shape, out.dtype) == (x.shape, dtype)

    exact = torch.zeros(6, model.hidden, dtype=torch.float64)
    for t in range(6):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            y = {
                p: (lambda row, e=e, p=p: model.weights[e, p].double() @ row + model.biases[e, p])
                for p in method.projections
            }
            h = y["up"](x[t].double())
            silu = torch.nn.functional.silu
            h = silu(y["gate"](x[t].double())) * h if is_gated else silu(h)
            exact[t] += weight * y["down"](h)
    error = float((out.double() - exact).norm() / exact.norm())
    # int8 rows: a step is about 3 sigma / 127, which rounds a Gaussian weight off by 0.7 %, and h,
    # a product with longer tails, by 1.2 %. e4m3 has 3 bits of mantissa: 2.6 % on average. All
    # that enters (weights twice, x, h) adds up in quadrature. Gate and up swapped, a bias lost,
    # or an expert taken for another are off by more than 30 %. Four bits: 8.4 % for each of three
    # weights that an output is made of, and 11.2 % where they are e2m1.
    bounds = {torch.float8_e4m3fn: 0.14, torch.float8_e8m0fnu: 0.19}
    by_code = {torch.int8: 0.025}.get(scheme.weight_dtype, 0.06)
    assert error < bounds.get(scheme.group_dtype, by_code)  # type: ignore[arg-type]


@EVERY_SCHEME
def test_biases_are_used(scheme: OnlineQuantScheme, backend: str) -> None:
    model = checkpoint(2, 24, 16, has_bias=True, dtype=FP32)
    for (_, projection), weight in model.weights.items():
        if projection != "down":
            weight.zero_()  # h is silu(gate bias) * up bias, whatever x is
    model.weights[0, "down"].copy_(torch.eye(24, 16))
    method, layer = loaded(model, scheme, backend=backend)
    out = method.apply(
        layer, tokens(3, model), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    )
    h = torch.nn.functional.silu(model.biases[0, "gate"]) * model.biases[0, "up"]
    expected = torch.cat([h, torch.zeros(8)]) + model.biases[0, "down"]
    # Ones and zeros are exact codes; only h may be quantized, to half a step of its largest.
    half_a_step = 0.5 / 127 if scheme.weight_dtype == torch.int8 else 1 / 16
    slack = half_a_step * h.abs().max() * 1.01
    assert bool(((out - expected).abs() <= slack).all())
    assert bool((out != 0).any())


def rank(
    model: Checkpoint, scheme: OnlineQuantScheme, local: list[int], backend: str
) -> tuple[OnlineMoEMethodBase, nn.Module]:
    return loaded(model, scheme, local_experts=local, backend=backend)


@EVERY_SCHEME
def test_a_rank_holds_its_own_experts_only(scheme: OnlineQuantScheme, backend: str) -> None:
    model = checkpoint(8, 24, 16, has_bias=True)
    method, layer = rank(model, scheme, LOCAL, backend)
    weights = method.weights(layer)
    assert weights.num_experts == 4
    for parameter in layer.parameters():
        assert parameter.shape[0] == 4  # scales too, not sized by all eight
        assert parameter.device == layer.w13_codes.device
    _, everything = loaded(model, scheme, backend=backend)
    for name, value in everything.named_parameters():
        mine = value[4:].detach().contiguous().view(torch.uint8).numpy().tobytes()
        assert stored(layer)[name] == mine


@EVERY_SCHEME
def test_scales_and_codes_share_a_device_all_along(scheme: OnlineQuantScheme, backend: str) -> None:
    model = checkpoint(8, 24, 16)
    method, _ = created(model, scheme, backend=backend)
    layer = nn.Module()
    method.create_weights(
        layer, num_experts=8, hidden_size=24, intermediate_size=16, local_experts=LOCAL
    )
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    method.materialize(layer, torch.device("cpu"))
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    arrive(method, layer, model)
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}


def test_tensors_of_other_ranks_are_skipped_and_those_of_none_refused(backend: str) -> None:
    model = checkpoint(8, 24, 16, has_bias=True)
    method, layer = created(model, ONE, local_experts=LOCAL, backend=backend)
    before = stored(layer)
    foreign = [arrival for arrival in model.arrivals() if arrival[0] < 4]
    arrive(method, layer, model, foreign)
    arrive(method, layer, model, foreign)  # as often as they like
    method.load_expert(layer, 0, "up", torch.full((1, 1), torch.nan), "not even looked at")
    assert stored(layer) == before
    with pytest.raises(CheckpointError, match="expert 8 of a layer that has 8"):
        method.load_expert(layer, 8, "up", torch.ones(16, 24), "w")
    with pytest.raises(CheckpointError, match=r"24 expert tensors never arrived.* of expert 4"):
        method.process_weights_after_loading(layer, activation="silu")


def test_local_experts_keep_the_order_that_was_given(backend: str) -> None:
    model = checkpoint(4, 24, 16)
    _, layer = rank(model, ONE, [3, 0], backend)
    _, everything = loaded(model, ONE, backend=backend)
    assert torch.equal(layer.w2_codes, everything.w2_codes[[3, 0]])
    assert torch.equal(layer.w13_scale, everything.w13_scale[[3, 0]])


@EVERY_SCHEME
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_sentinel_ids_add_nothing(
    scheme: OnlineQuantScheme, id_dtype: torch.dtype, backend: str
) -> None:
    model = checkpoint(8, 24, 16, has_bias=True, dtype=FP32)
    method, layer = rank(model, scheme, LOCAL, backend)
    x = tokens(4, model)
    ids = torch.tensor([[0, 3], [-1, 3], [0, 4], [4, -1]], dtype=id_dtype)
    out = method.apply(layer, x, ids, torch.full((4, 2), 0.5))
    alone = method.apply(layer, x, ids[:, :1].clamp(0, 3), torch.full((4, 1), 0.5))
    other = method.apply(layer, x, ids[:, 1:].clamp(0, 3), torch.full((4, 1), 0.5))
    assert torch.equal(out[0], alone[0] + other[0])  # two terms: fp32 addition commutes
    assert torch.equal(out[1], other[1])
    assert torch.equal(out[2], alone[2])
    assert torch.equal(out[3], torch.zeros(24))
    assert bool((out[:3] != 0).all())


@pytest.mark.parametrize("own_gate", [False, True])
def test_not_even_nan_that_comes_with_a_sentinel_gets_through(own_gate: bool, backend: str) -> None:
    model = checkpoint(2, 24, 16, dtype=FP32)
    method, layer = created(model, ONE, backend=backend)
    arrive(method, layer, model)
    # A rank may leave the routing weights of other ranks as it found them, and a model's code may
    # divide by the zeros that other ranks' rows are.
    how = {"gate": silu_gate, "after": lambda y: y / y} if own_gate else {"activation": "silu"}
    method.process_weights_after_loading(layer, **how)  # type: ignore[arg-type]
    ids, weights = torch.tensor([[0, -1], [2, 1]]), torch.tensor([[1, torch.nan], [torch.inf, 1]])
    out = method.apply(layer, tokens(2, model), ids, weights)
    alone = method.apply(layer, tokens(2, model), torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert bool(torch.isfinite(alone).all())
    assert torch.equal(out, alone)


@EVERY_SCHEME
@pytest.mark.parametrize("own_gate", [False, True])
def test_ranks_together_give_what_one_gives_alone(
    scheme: OnlineQuantScheme, own_gate: bool, backend: str
) -> None:
    model = checkpoint(8, 24, 16, has_bias=True, dtype=FP32)
    x = tokens(9, model)
    ids, weights = routing(9, 8)
    how = {"gate": silu_gate} if own_gate else {"activation": "silu"}

    def output(local: list[int] | None) -> Tensor:
        method, layer = created(model, scheme, local_experts=local, backend=backend)
        arrive(method, layer, model)
        method.process_weights_after_loading(layer, **how)  # type: ignore[arg-type]
        if local is None:
            return method.apply(layer, x, ids, weights)
        local_ids = torch.where(torch.isin(ids, torch.tensor(local)), ids - local[0], 4)
        return method.apply(layer, x, local_ids, weights)

    together = output([0, 1, 2, 3]) + output(LOCAL)
    # Two experts per token: at most one addition, here or there. On the CPU an expert's GEMM may
    # meet other experts' rows in another order, never in other numbers.
    assert torch.equal(together, output(None))


@EVERY_SCHEME
@pytest.mark.parametrize("own_gate", [False, True])
def test_zero_weights_and_zero_tokens_give_finite_zeros(
    scheme: OnlineQuantScheme, own_gate: bool, backend: str
) -> None:
    model = checkpoint(3, 140, 150, dtype=torch.bfloat16)
    model.weights[0, "gate"][7] = 0
    model.weights[0, "down"][9] = 0
    for projection in ("gate", "up", "down"):
        model.weights[2, projection].zero_()
    method, layer = created(model, scheme, backend=backend)
    arrive(method, layer, model)
    how = {"gate": silu_gate} if own_gate else {"activation": "silu"}
    method.process_weights_after_loading(layer, **how)  # type: ignore[arg-type]
    x = tokens(3, model, torch.bfloat16)
    x[1] = 0
    out = method.apply(layer, x, torch.tensor([[0], [0], [2]]), torch.ones(3, 1))
    assert bool(torch.isfinite(out).all())
    assert bool((out[1:] == 0).all())
    assert out[0, 9] == 0  # the zero row of down
    assert bool((out[0, :9] != 0).all())


@EVERY_SCHEME
@pytest.mark.parametrize("own_gate", [False, True])
def test_no_tokens_give_no_outputs(scheme: OnlineQuantScheme, own_gate: bool, backend: str) -> None:
    model = checkpoint(2, 24, 16, dtype=torch.bfloat16)
    method, layer = created(model, scheme, backend=backend)
    arrive(method, layer, model)
    how = {"gate": silu_gate} if own_gate else {"activation": "silu"}
    method.process_weights_after_loading(layer, **how)  # type: ignore[arg-type]
    out = method.apply(layer, tokens(0, model, torch.bfloat16), *routing(0, 2))
    assert (out.shape, out.dtype) == ((0, 24), torch.bfloat16)


def silu_gate(h13: Tensor) -> Tensor:
    """What a model's own `_apply_gate` looks like: [S, 2I] -> [S, I]."""
    gate, up = h13.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@EVERY_SCHEME
def test_a_gate_of_the_models_own_equals_the_named_activation(
    scheme: OnlineQuantScheme, backend: str
) -> None:
    model = checkpoint(3, 140, 150, has_bias=True, dtype=FP32)
    x = tokens(7, model)
    ids, weights = routing(7, 3)
    ids[2, 1] = 3  # a sentinel
    named, layer = loaded(model, scheme, backend=backend)
    own, own_layer = created(model, scheme, backend=backend)
    arrive(own, own_layer, model)
    own.process_weights_after_loading(own_layer, gate=silu_gate)
    # In fp32 nothing is rounded between the halves, and two terms commute.
    out = own.apply(own_layer, x, ids, weights)
    torch.testing.assert_close(out, named.apply(layer, x, ids, weights), rtol=0, atol=0)


def test_a_gate_may_clamp_and_what_comes_after_sees_every_experts_output(backend: str) -> None:
    model = checkpoint(3, 24, 16, is_gated=False, has_bias=True, dtype=FP32)
    method, layer = created(model, ONE, backend=backend)
    arrive(method, layer, model)
    seen: list[tuple[int, ...]] = []

    def clamp(h: Tensor) -> Tensor:
        seen.append(tuple(h.shape))
        return h.clamp(max=0.25)

    def double(y: Tensor) -> Tensor:
        seen.append(tuple(y.shape))
        return 2 * y + 1

    method.process_weights_after_loading(layer, gate=clamp, after=double)
    x = tokens(3, model)
    ids = torch.tensor([[0, 1], [2, -1], [3, 2]])
    weights = torch.tensor([[0.75, 0.25], [1.0, 1.0], [1.0, 0.5]])
    out = method.apply(layer, x, ids, weights)
    assert seen == [(6, 16), (6, 24)]
    held = method.weights(layer)
    w13 = dequantize(held.w13, held.w13_scale, ONE.granularity)
    w2 = dequantize(held.w2, held.w2_scale, ONE.granularity)
    assert held.b13 is not None
    assert held.b2 is not None
    expected = torch.zeros(3, 24)
    # -1 and 3 are of other ranks: what comes after those is not counted either.
    for t, slot in ((0, 0), (0, 1), (1, 0), (2, 1)):
        e = int(ids[t, slot])
        h = (w13[e] @ x[t] + held.b13[e]).clamp(max=0.25)
        expected[t] += weights[t, slot] * (2 * (w2[e] @ h + held.b2[e]) + 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 24, in any order
