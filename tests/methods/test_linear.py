"""The life of one quantized `nn.Linear`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moeq import oracle
from moeq.errors import CheckpointError, NonFiniteError
from moeq.experts import code_columns, group_shape, scale_shape
from moeq.methods.linear import OnlineLinearMethod
from moeq.schemes import OnlineQuantScheme
from tests.quantized import quantized

LINEAR_SCHEMES = [scheme for scheme in OnlineQuantScheme if scheme.covers("linear")]
EVERY_SCHEME = pytest.mark.parametrize("scheme", LINEAR_SCHEMES, ids=lambda scheme: scheme.value)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu"])
ROWS = OnlineQuantScheme.FP8_PER_CHANNEL
CPU = torch.device("cpu")
N, K = 150, 140


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def created(
    scheme: OnlineQuantScheme, *, backend: str = "reference", dtype: torch.dtype = torch.bfloat16
) -> tuple[OnlineLinearMethod, nn.Module]:
    method, layer = OnlineLinearMethod(scheme, backend=backend), nn.Module()
    method.create_weights(layer, in_features=K, out_features=N, dtype=dtype)
    return method, layer


@EVERY_SCHEME
def test_create_weights_takes_no_memory(scheme: OnlineQuantScheme) -> None:
    method, layer = OnlineLinearMethod(scheme), nn.Module()
    method.create_weights(layer, in_features=1 << 20, out_features=1 << 20, dtype=torch.bfloat16)
    assert layer.weight_codes.is_meta
    assert layer.weight_scale.is_meta
    assert layer.weight_codes.dtype == scheme.weight_dtype
    assert layer.weight_scale.shape == scale_shape(scheme.granularity, (1 << 20, 1 << 20))
    assert layer.weight_scale.dtype == torch.float32
    columns = code_columns(scheme, 1 << 20)
    assert layer.weight_codes.shape == (1 << 20, columns)
    if scheme.group is not None:
        group = layer.weight_group_scale
        assert tuple(group.shape) == group_shape(scheme, (1 << 20, 1 << 20))
        assert group.is_meta
        assert group.dtype == scheme.group_dtype


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_is_quantized_on_arrival(scheme: OnlineQuantScheme, dtype: torch.dtype) -> None:
    method, layer = created(scheme, dtype=dtype)
    weight = random(N, K, dtype=dtype)
    method.load(layer, weight, "q_proj.weight", CPU)
    wanted = quantized(weight, scheme)
    assert torch.equal(layer.weight_scale, wanted.scale)
    assert torch.equal(layer.weight_codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    if wanted.group is not None:
        found = layer.weight_group_scale.view(torch.uint8)
        assert torch.equal(found, wanted.group.view(torch.uint8))
    for parameter in layer.parameters():
        assert parameter.device == CPU
        assert not parameter.requires_grad
    back = method.dequantized(layer)
    assert back.dtype == dtype
    # Half a step of the group's largest: 1/254 of it, or 16 of 448; of four bits 1/16, and as much
    # again where the largest of the other sign is clipped; 1/4 where 8 becomes 6. Then rounded to
    # dtype.
    worst = {torch.int8: 0.5 / 127, torch.uint8: 1 / 8}.get(scheme.weight_dtype, 1 / 28)
    if scheme is OnlineQuantScheme.MXFP4_WEIGHT_ONLY:
        worst = 1 / 4
    slack = worst * weight.abs().max() + torch.finfo(dtype).eps / 2 * weight.double().abs()
    assert bool(((back.double() - weight.double()).abs() <= 1.01 * slack).all())


def test_schemes_that_do_not_cover_linears_are_refused() -> None:
    with pytest.raises(AssertionError, match="WEIGHT_ONLY"):
        OnlineLinearMethod(OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY)


def test_a_weight_that_arrives_twice_is_refused() -> None:
    method, layer = created(ROWS)
    method.load(layer, random(N, K), "w", CPU)
    before = layer.weight_codes
    with pytest.raises(CheckpointError, match="w: arrived before"):
        method.load(layer, random(N, K, seed=1), "w", CPU)
    assert layer.weight_codes is before


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (random(K, N), CheckpointError, r"w: shape \[140, 150\], expected \[150, 140\]"),
        (random(N * K), CheckpointError, r"w: shape \[21000\], expected"),
        (random(N, K).char(), CheckpointError, "w: dtype torch.int8, expected bfloat16, float16"),
        (random(N, K).double(), CheckpointError, "w: dtype torch.float64, expected"),
        (random(N, K).to(torch.float8_e4m3fn), CheckpointError, "w: dtype torch.float8_e4m3fn"),
        (random(N, K) / 0, NonFiniteError, r"w: -?inf at \[0, 0\], 21000 of 21000"),
        (random(N, K) * math.nan, NonFiniteError, r"w: nan at \[0, 0\], 21000 of 21000"),
    ],
)
def test_bad_weights_are_refused_and_leave_the_layer_unloaded(
    weight: Tensor, error: type[Exception], message: str
) -> None:
    method, layer = created(ROWS)
    with pytest.raises(error, match=message):
        method.load(layer, weight, "w", CPU)
    if error is CheckpointError:
        assert layer.weight_codes.is_meta
    with pytest.raises(CheckpointError, match="a linear layer: its weight never arrived"):
        method.process_weights_after_loading(layer)


def test_process_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, layer = created(ROWS)
    method.load(layer, random(N, K), "w", CPU)
    method.process_weights_after_loading(layer)
    choice = method.choice
    assert choice is not None
    monkeypatch.setattr(oracle, "BACKENDS", ())
    method.process_weights_after_loading(layer)
    assert method.choice is choice


def test_what_was_saved_quantized_needs_no_arrival() -> None:
    method, layer = created(ROWS)
    layer.weight_scale = nn.Parameter(torch.ones(layer.weight_scale.shape), requires_grad=False)
    method.mark_loaded(layer, "q_proj")
    method.process_weights_after_loading(layer)
    assert method.choice is not None


def ready(
    scheme: OnlineQuantScheme, backend: str, weight: Tensor, bias: Tensor | None = None
) -> tuple[OnlineLinearMethod, nn.Module]:
    method, layer = created(scheme, backend=backend, dtype=weight.dtype)
    layer.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    method.load(layer, weight, "w", CPU)
    method.process_weights_after_loading(layer)
    return method, layer


@EVERY_SCHEME
@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_apply_stays_close_to_the_unquantized_linear(
    scheme: OnlineQuantScheme, backend: str, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, x = random(N, K, dtype=dtype), random(2, 3, K, seed=1, dtype=dtype)
    bias = 30 * random(N, seed=2, dtype=dtype) if has_bias else None
    method, layer = ready(scheme, backend, weight, bias)
    out = method.apply(layer, x, layer.bias)
    assert (out.shape, out.dtype) == ((2, 3, N), dtype)
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    error = float((out.double() - exact).norm() / (x.double() @ weight.double().T).norm())
    # int8 steps of 3 sigma / 127 round a Gaussian off by 0.7 %, e4m3's 3 bits of mantissa by 2.6 %;
    # weights and activations both. A bias rounded with the sum to bf16 adds 30 * 0.1 % / 12. Steps
    # of four bits are about an eighth of the largest of 32, 2.2 sigma: 8.4 %, 11.2 % as e2m1
    # (tests/test_int4_and_mxfp4.py).
    bounds = {torch.float8_e4m3fn: 0.085, torch.float8_e8m0fnu: 0.12}
    by_code = {torch.int8: 0.015}.get(scheme.weight_dtype, 0.045)
    assert error < bounds.get(scheme.group_dtype, by_code)  # type: ignore[arg-type]


@EVERY_SCHEME
@EVERY_BACKEND
def test_zero_rows_and_zero_tokens_stay_zero(scheme: OnlineQuantScheme, backend: str) -> None:
    weight, x = random(N, K), random(4, K, seed=1)
    weight[3] = 0
    x[2] = 0
    method, layer = ready(scheme, backend, weight)
    out = method.apply(layer, x, layer.bias)
    assert bool(torch.isfinite(out).all())
    assert bool((out[2] == 0).all())
    assert bool((out[:, 3] == 0).all())
    assert int((out == 0).sum()) == N + 4 - 1


@EVERY_SCHEME
@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_no_tokens_give_no_outputs(
    scheme: OnlineQuantScheme, backend: str, shape: tuple[int, ...]
) -> None:
    method, layer = ready(scheme, backend, random(N, K), random(N))
    out = method.apply(layer, torch.empty(shape, dtype=torch.bfloat16), layer.bias)
    assert out.shape == (*shape[:-1], N)


@EVERY_SCHEME
@EVERY_BACKEND
def test_a_single_row_needs_no_batch(scheme: OnlineQuantScheme, backend: str) -> None:
    method, layer = ready(scheme, backend, random(N, K))
    x = random(K, seed=1)
    together = method.apply(layer, x[None], layer.bias)
    assert torch.equal(method.apply(layer, x, layer.bias), together[0])


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_no_quantizer_makes_is_refused(value: float) -> None:
    method, layer = created(ROWS)
    scale = torch.ones(layer.weight_scale.shape)
    scale[-1] = value
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale"):
        method.mark_loaded(layer, "q_proj")
