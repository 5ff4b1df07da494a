"""The life of a MoE layer's weights up to its first token: create, arrive, process."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from torch import nn

from moeq import oracle
from moeq.config import OnlineQuantizationConfig
from moeq.errors import BackendError, CheckpointError, ModelError, NonFiniteError
from moeq.methods import matrices
from moeq.methods.base import OnlineMoEMethodBase, Projection
from moeq.methods.parameters import finite_scales
from moeq.quantize import LARGEST, QMAX, amax, scale_from_amax
from moeq.schemes import Granularity, OnlineQuantScheme
from tests import four_bits
from tests.methods.moe import Checkpoint, arrive, checkpoint, created, loaded, routing, stored
from tests.quantized import quantized

EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
ONE = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
BLOCKS = OnlineQuantScheme.FP8_PER_BLOCK
INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
TENSOR = OnlineQuantScheme.FP8_PER_TENSOR


def method_of(scheme: OnlineQuantScheme) -> OnlineMoEMethodBase:
    method = OnlineQuantizationConfig(moe=scheme).get_quant_method("experts", "moe")
    assert isinstance(method, OnlineMoEMethodBase)
    return method


@EVERY_SCHEME
def test_create_weights_takes_no_memory(scheme: OnlineQuantScheme) -> None:
    layer = nn.Module()
    method_of(scheme).create_weights(  # 412 GB of codes, which nobody could allocate
        layer, num_experts=2048, hidden_size=8192, intermediate_size=8192, has_bias=True
    )
    parameters = dict(layer.named_parameters())
    kinds = ("bias", "codes", "scale") + ("group_scale",) * (scheme.group is not None)
    assert sorted(parameters) == sorted(
        f"{name}_{kind}" for name in ("w13", "w2") for kind in kinds
    )
    assert all(p.is_meta and not p.requires_grad for p in parameters.values())


@EVERY_SCHEME
@pytest.mark.parametrize("is_gated", [True, False])
def test_create_weights_registers_the_layout_of_experts(
    scheme: OnlineQuantScheme, is_gated: bool
) -> None:
    model = checkpoint(is_gated=is_gated, has_bias=True, dtype=torch.float16)
    method, layer = created(model, scheme)
    weights = method.weights(layer)  # checks shapes and dtypes of codes and scales
    assert weights.w13.shape[:2] == (3, 300 if is_gated else 150)
    assert (weights.hidden_size, weights.intermediate_size) == (140, 150)
    assert weights.is_gated is is_gated
    assert method.projections == (("gate", "up", "down") if is_gated else ("up", "down"))
    assert weights.b13 is not None
    assert weights.b13.dtype == torch.float16  # the model's, not the default


def test_materialize_takes_memory_once() -> None:
    method, layer = created(checkpoint(), ONE)
    before = layer.w13_codes
    method.materialize(layer, torch.device("cpu"))
    assert layer.w13_codes is before


@EVERY_SCHEME
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arriving_piece_by_piece_equals_quantizing_the_whole(
    scheme: OnlineQuantScheme, is_gated: bool, dtype: torch.dtype
) -> None:
    model = checkpoint(is_gated=is_gated, dtype=dtype)
    _, layer = loaded(model, scheme)
    granularity = scheme.granularity
    parts = ("gate", "up") if is_gated else ("up",)

    def stack(projection: str) -> torch.Tensor:
        return torch.stack([model.weights[e, projection] for e in range(3)])

    maxima = [amax(stack(part), granularity) for part in parts]
    if granularity is Granularity.TENSOR:  # one scale for gate and up
        maxima = [torch.stack(maxima).amax(0)] * len(parts)
    up = [quantized(stack(p), scheme, m) for p, m in zip(parts, maxima, strict=True)]
    shared = granularity is Granularity.TENSOR
    scale13 = up[0].scale if shared else torch.cat([each.scale for each in up], dim=1)
    assert torch.equal(layer.w13_scale, scale13)
    assert torch.equal(layer.w13_codes.float(), torch.cat([u.codes.float() for u in up], dim=1))
    down = quantized(stack("down"), scheme)
    assert torch.equal(layer.w2_scale, down.scale)
    assert torch.equal(layer.w2_codes.float(), down.codes.float())
    groups = {name for name in layer._parameters if name.endswith("_group_scale")}
    assert len(groups) == (0 if scheme.group is None else 2)
    for name, wanted in (("w13_group_scale", up), ("w2_group_scale", [down])):
        if groups:
            joined = torch.cat([each.group.float() for each in wanted], dim=1)
            assert torch.equal(layer.get_parameter(name).float(), joined)


@EVERY_SCHEME
def test_the_order_of_arrival_does_not_change_the_bytes(scheme: OnlineQuantScheme) -> None:
    model = checkpoint(has_bias=True)
    expected = stored(loaded(model, scheme)[1])
    orders = [list(reversed(model.arrivals()))]
    orders.append(sorted(model.arrivals(), key=lambda arrival: arrival[1:]))  # all gates first
    for seed in range(3):
        orders.append(random.Random(seed).sample(model.arrivals(), len(model.arrivals())))
    for order in orders:
        method, layer = created(model, scheme)
        arrive(method, layer, model, order)
        method.process_weights_after_loading(layer, activation="silu")
        assert stored(layer) == expected


@pytest.mark.parametrize("order", [*itertools.permutations(("gate", "up", "down"))], ids=repr)
def test_per_tensor_gate_and_up_share_the_scale_of_the_larger(order: tuple[str, ...]) -> None:
    model = checkpoint(2)
    model.weights[0, "gate"][0, 0] = 3.5
    model.weights[1, "up"][0, 0] = -7
    method, layer = created(model, TENSOR)
    arrive(method, layer, model, [(e, p, False) for p in order for e in (0, 1)])
    assert layer.w13_scale.tolist() == [3.5 / 448, 7 / 448]
    assert layer.w13_codes[0, 0, 0].float() == 448
    assert layer.w13_codes[1, model.intermediate, 0].float() == -448
    quieter = layer.w13_codes[0, model.intermediate :].float().abs().max()
    assert 0 < quieter < 448  # up of expert 0 does not reach the top of its scale


def test_a_pair_that_waits_does_not_hold_the_readers_buffer() -> None:
    model = checkpoint(1)
    expected = stored(loaded(model, TENSOR)[1])
    method, layer = created(model, TENSOR)
    buffer = model.weights[0, "gate"].clone()
    method.load_expert(layer, 0, "gate", buffer, "gate")
    buffer.copy_(model.weights[0, "up"])  # the same memory, overwritten by the next read
    method.load_expert(layer, 0, "up", buffer, "up")
    arrive(method, layer, model, [(0, "down", False)])
    assert stored(layer) == expected


def test_biases_land_gate_then_up_unquantized() -> None:
    model = checkpoint(2, has_bias=True)
    _, layer = loaded(model, BLOCKS)
    for e in range(2):
        gate, up, down = (model.biases[e, p] for p in ("gate", "up", "down"))
        assert torch.equal(layer.w13_bias[e], torch.cat([gate, up]))
        assert torch.equal(layer.w2_bias[e], down)


def test_process_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, layer = loaded(checkpoint(), ONE)
    choice, before = method.choice, stored(layer)
    assert choice is not None
    assert choice.backend.name == "reference"
    monkeypatch.setattr(oracle, "BACKENDS", ())
    method.process_weights_after_loading(layer)  # not even its arguments are looked at
    assert method.choice is choice
    assert stored(layer) == before


@pytest.mark.parametrize("missing", [(0, "gate", False), (2, "down", False), (1, "up", True)])
@EVERY_SCHEME
def test_process_refuses_and_names_what_never_arrived(
    scheme: OnlineQuantScheme, missing: tuple[int, str, bool]
) -> None:
    model = checkpoint(has_bias=True)
    method, layer = created(model, scheme)
    arrive(method, layer, model, [a for a in model.arrivals() if a != missing])
    with pytest.raises(CheckpointError) as caught:
        method.process_weights_after_loading(layer, activation="silu")
    what = f"{missing[1]}{' bias' if missing[2] else ''} of expert {missing[0]}"
    assert caught.value.message == f"the layer: 1 expert tensors never arrived, the first: {what}"
    arrive(method, layer, model, [missing])
    method.process_weights_after_loading(layer, activation="silu")
    assert method.choice is not None


@EVERY_SCHEME
@pytest.mark.parametrize("is_bias", [False, True])
def test_a_tensor_that_arrives_twice_is_refused(scheme: OnlineQuantScheme, is_bias: bool) -> None:
    model = checkpoint(has_bias=True)
    method, layer = created(model, scheme)
    arrive(method, layer, model, [(1, "gate", is_bias)])
    before = stored(layer)
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_proj.*expert 1 arrived before"):
        arrive(method, layer, model, [(1, "gate", is_bias)])
    assert stored(layer) == before


def load_wrong(scheme: OnlineQuantScheme, projection: str, weight: torch.Tensor) -> None:
    """Load one bad tensor; nothing may be written, and the layer must stay incomplete."""
    model = checkpoint()
    method, layer = created(model, scheme)
    arrive(method, layer, model, [a for a in model.arrivals() if a != (1, projection, False)])
    before = stored(layer)
    try:
        method.load_expert(layer, 1, projection, weight, "e.1.weight")  # type: ignore[arg-type]
    finally:
        assert stored(layer) == before
        with pytest.raises(CheckpointError, match=f"never arrived, the first: {projection} of e"):
            method.process_weights_after_loading(layer, activation="silu")


@EVERY_SCHEME
@pytest.mark.parametrize(
    ("projection", "shape", "expected"),
    [("gate", (140, 150), "[150, 140]"), ("down", (150, 140), "[140, 150]"), ("up", (150,), "")],
)
def test_misshapen_weights_are_refused(
    scheme: OnlineQuantScheme, projection: str, shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_wrong(scheme, projection, torch.ones(shape, dtype=torch.bfloat16))
    assert caught.value.message.startswith(f"e.1.weight: shape {list(shape)}, expected {expected}")
    assert caught.value.message.endswith(f"for the {projection} projection of expert 1")


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.bool])
def test_weights_that_are_quantized_already_are_refused(
    scheme: OnlineQuantScheme, dtype: torch.dtype
) -> None:
    with pytest.raises(CheckpointError, match=f"e.1.weight: dtype {dtype}, expected bfloat16"):
        load_wrong(scheme, "up", torch.ones(150, 140).to(dtype))


@EVERY_SCHEME
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_nan_and_inf_are_refused(scheme: OnlineQuantScheme, value: float, projection: str) -> None:
    weight = checkpoint().weights[1, projection].clone()
    weight[-1, -1] = value
    with pytest.raises(NonFiniteError, match=r"e\.1\.weight: .* at \[1[34]9, 1[34]9\], 1 of 21000"):
        load_wrong(scheme, projection, weight)


def test_bad_biases_are_refused() -> None:
    model = checkpoint(has_bias=True)
    method, layer = created(model, ONE)
    with pytest.raises(CheckpointError, match=r"b: shape \[300\], expected \[150\]"):
        method.load_bias(layer, 0, "up", torch.zeros(300), "b")
    with pytest.raises(NonFiniteError, match=r"b: nan at \[149\], 1 of 150"):
        method.load_bias(layer, 0, "up", torch.tensor([0.0] * 149 + [math.nan]), "b")
    with pytest.raises(CheckpointError, match="not due"):
        method_without, layer_without = created(checkpoint(), ONE)
        method_without.load_bias(layer_without, 0, "up", torch.zeros(150), "b")


@pytest.mark.parametrize("expert", [-1, 3])
def test_experts_that_the_layer_does_not_have_are_refused(expert: int) -> None:
    method, layer = created(checkpoint(3), ONE)
    with pytest.raises(CheckpointError, match=f"w: expert {expert} of a layer that has 3"):
        method.load_expert(layer, expert, "up", torch.ones(150, 140), "w")


def test_a_gateless_layer_has_no_use_for_a_gate() -> None:
    method, layer = created(checkpoint(is_gated=False), ONE)
    with pytest.raises(CheckpointError, match="gate of expert 0 arrived before or is not due"):
        method.load_expert(layer, 0, "gate", torch.ones(150, 140), "w")


def test_a_layer_needs_a_named_activation_or_a_gate_and_not_both() -> None:
    model = checkpoint()
    for arguments in ({}, {"activation": "silu", "gate": torch.relu}):
        method, layer = created(model, ONE)
        arrive(method, layer, model)
        with pytest.raises(ModelError, match="either an activation's name or a gate"):
            method.process_weights_after_loading(layer, **arguments)  # type: ignore[arg-type]
        assert method.choice is None


def test_an_unknown_backend_is_an_error_that_leaves_the_layer_unprocessed() -> None:
    model = checkpoint()
    method, layer = created(model, ONE, backend="warp")
    arrive(method, layer, model)
    with pytest.raises(BackendError, match="unknown kernel backend 'warp'"):
        method.process_weights_after_loading(layer, activation="silu")
    assert method.choice is None


@EVERY_SCHEME
def test_a_layer_of_zeros_has_scales_of_one(scheme: OnlineQuantScheme) -> None:
    zeros = checkpoint(2)
    for weight in zeros.weights.values():
        weight.zero_()
    method, layer = loaded(zeros, scheme)
    for scale in (layer.w13_scale, layer.w2_scale):
        assert torch.equal(scale, torch.ones_like(scale))
    zero = 0x11 * four_bits.ZERO.get(scheme, 0)
    for codes in (layer.w13_codes, layer.w2_codes):
        assert bool((codes.float() == zero).all())
    for slot in range(2):
        for weight in method.dequantized(layer, slot):
            assert bool((weight == 0).all())


@EVERY_SCHEME
def test_experts_of_zeros_are_told_by_their_global_ids(scheme: OnlineQuantScheme) -> None:
    method, layer = loaded(checkpoint(), scheme)
    assert method.empty_experts(layer) == []
    method._local = {4: 0, 7: 1, 9: 2}
    zero = 0x11 * four_bits.ZERO.get(scheme, 0)
    for name in ("w13", "w2"):
        layer.get_parameter(f"{name}_codes").data[1:].fill_(zero)
        layer.get_parameter(f"{name}_scale").data[1:] = 1
    layer.w2_codes.data[2, -1, -1] = 3  # ones are also the scales of numbers up to qmax
    assert method.empty_experts(layer) == [7]


@EVERY_SCHEME
@pytest.mark.parametrize("value", [math.nan, math.inf, torch.finfo(torch.float32).max])
def test_what_a_gpu_quantized_is_judged_by_its_scales(
    scheme: OnlineQuantScheme, value: float
) -> None:
    _, layer = loaded(checkpoint(), scheme)
    assert finite_scales(layer)
    largest = torch.tensor([LARGEST, value])
    good, bad = scale_from_amax(largest, scheme.weight_dtype)
    layer.w2_scale.data.view(-1)[-1] = good
    assert finite_scales(layer)
    layer.w2_scale.data.view(-1)[-1] = bad
    assert not finite_scales(layer)


@EVERY_SCHEME
def test_codes_use_their_whole_range(scheme: OnlineQuantScheme) -> None:
    model: Checkpoint = checkpoint()
    _, layer = loaded(model, scheme)
    if scheme.group is not None:  # all sixteen, in either half of a byte; mxfp4 has no -0
        expected = [code for code in range(16) if code != 8 or scheme is INT4]
        for codes in (layer.w13_codes & 15, layer.w13_codes >> 4):
            assert sorted(codes.unique().tolist()) == expected
        return
    assert layer.w2_codes.float().abs().amax(dim=(1, 2)).tolist() == [QMAX[scheme.weight_dtype]] * 3


def test_what_was_saved_quantized_needs_no_arrivals() -> None:
    model = checkpoint()
    saved, layer = loaded(model, ONE)
    method, fresh = created(model, ONE)
    fresh.load_state_dict(layer.state_dict(), assign=True)
    misplaced = torch.empty(fresh.w2_codes.numel() + 1, dtype=torch.int8)[1:]
    fresh.w2_codes.data = misplaced.view(fresh.w2_codes.shape).copy_(layer.w2_codes)
    assert fresh.w2_codes.data_ptr() % 64 != 0
    method.mark_loaded(fresh, "experts")
    assert fresh.w2_codes.data_ptr() % 64 == 0  # vector loads are slow elsewhere, or refused
    method.process_weights_after_loading(fresh, activation="silu")
    assert method.choice is not None
    assert stored(fresh) == stored(layer)
    assert saved.choice is not None


@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 7), (33, 16), (32, 32), (64, 1)])
@pytest.mark.parametrize("is_gated", [True, False])
def test_dequantized_is_what_acts_of_an_expert(
    is_gated: bool, hidden: int, intermediate: int
) -> None:
    """Gate rows, then up rows, without what fills rows up."""
    model = checkpoint(2, hidden, intermediate, is_gated=is_gated)
    for scheme in OnlineQuantScheme:
        method, layer = loaded(model, scheme)
        for expert in range(2):
            w13, w2 = method.dequantized(layer, expert)
            assert w13.dtype == w2.dtype == torch.float32
            names = ("gate", "up") if is_gated else ("up",)
            given = torch.cat([model.weights[expert, name] for name in names]).float()
            for found, exact in ((w13, given), (w2, model.weights[expert, "down"].float())):
                assert found.shape == exact.shape
                most = 0.14 if scheme is OnlineQuantScheme.MXFP4_WEIGHT_ONLY else 0.12
                assert (found - exact).norm() <= most * exact.norm()


# A part of every expert


@pytest.mark.parametrize("rows_alone", [False, True])
@pytest.mark.parametrize("is_gated", [True, False])
def test_local_channels_are_a_part_of_the_whole(is_gated: bool, rows_alone: bool) -> None:
    """To the bit, also where another rank holds the largest value of a row of down; gate and up
    arrive whole or as the rows that are held."""
    model = checkpoint(is_gated=is_gated)
    for expert in range(model.num_experts):
        model.weights[expert, "down"][7, 3 + 70 * expert] = 9.0
    whole = loaded(model, ONE)[1]
    for channels in (range(75), range(75, 150)):
        held = slice(channels.start, channels.stop)
        method, layer = created(model, ONE, local_channels=channels)
        weights = dict(model.weights)
        if rows_alone:
            weights |= {key: w[held] for key, w in weights.items() if key[1] != "down"}
        arrive(method, layer, dataclasses.replace(model, weights=weights))
        method.process_weights_after_loading(layer, activation="silu")
        parts = 2 if is_gated else 1
        for name in ("w13_codes", "w13_scale"):
            split = whole.get_parameter(name).unflatten(1, (parts, 150))[:, :, held]
            assert torch.equal(layer.get_parameter(name), split.flatten(1, 2)), name
        assert torch.equal(layer.w2_codes, whole.w2_codes[:, :, held])
        assert torch.equal(layer.w2_scale, whole.w2_scale)


@EVERY_SCHEME
@pytest.mark.parametrize("is_gated", [True, False])
def test_local_channels_have_the_scales_of_whole_matrices(
    scheme: OnlineQuantScheme, is_gated: bool
) -> None:
    """To the bit, under every scheme, in an order of arrival that keeps pairs waiting."""
    model = checkpoint(is_gated=is_gated, hidden=140, intermediate=300)
    for expert in range(model.num_experts):
        model.weights[expert, "down"][7, 3] = 9.0
        model.weights[expert, "up"][299, 5] = 7.0
    whole = loaded(model, scheme)[1]
    blocks = scheme.granularity is Granularity.BLOCK
    packing = 1 if scheme.group is None else 2  # weights to an element of codes
    for channels in (range(128), range(128, 256), range(256, 300)):
        held = slice(channels.start, channels.stop)
        method, layer = created(model, scheme, local_channels=channels)
        arrive(method, layer, model, list(reversed(model.arrivals())))
        method.process_weights_after_loading(layer, activation="silu")
        parts = 2 if is_gated else 1
        split = whole.w13_codes.view(torch.int8).unflatten(1, (parts, 300))[:, :, held]
        assert torch.equal(layer.w13_codes.view(torch.int8), split.flatten(1, 2))
        columns = slice(held.start // packing, held.stop // packing)
        if channels.stop == 300 and scheme.group is not None:
            columns = slice(columns.start, None)  # what fills the last group up is of the last part
        codes = whole.w2_codes.view(torch.int8)[:, :, columns]
        assert torch.equal(layer.w2_codes.view(torch.int8), codes)
        if scheme.group is not None:
            up, down = (
                whole.get_parameter(f"{name}_group_scale").view(torch.uint8)
                for name in ("w13", "w2")
            )
            up = up.unflatten(1, (parts, 300))[:, :, held].flatten(1, 2)
            down = down[:, :, channels.start // 32 : -(-channels.stop // 32)]
            assert torch.equal(layer.w13_group_scale.view(torch.uint8), up)
            assert torch.equal(layer.w2_group_scale.view(torch.uint8), down)
        if blocks:
            held = slice(channels.start // 128, -(-channels.stop // 128))
            grid = whole.w13_scale.unflatten(1, (parts, 3))[:, :, held].flatten(1, 2)
            assert torch.equal(layer.w13_scale, grid)
            assert torch.equal(layer.w2_scale, whole.w2_scale[:, :, held])
            continue
        assert torch.equal(layer.w2_scale, whole.w2_scale)
        expected = whole.w13_scale
        if scheme.granularity is Granularity.CHANNEL:
            expected = expected.unflatten(1, (parts, 300))[:, :, held].flatten(1, 2)
        assert torch.equal(layer.w13_scale, expected)


@pytest.mark.parametrize(
    ("scheme", "size", "channels"),
    [
        (BLOCKS, 128, range(75)),
        (BLOCKS, 128, range(128, 200)),
        (INT4, 32, range(75)),
        (INT4, 32, range(16, 32)),
        (INT4, 32, range(256, 290)),
        (INT4, 32, range(1, 300)),
    ],
)
def test_what_shares_a_scale_in_a_row_is_not_divided(
    scheme: OnlineQuantScheme, size: int, channels: range
) -> None:
    with pytest.raises(ModelError) as caught:
        created(checkpoint(intermediate=300), scheme, local_channels=channels)
    assert caught.value.message == (
        f"channels {channels.start} to {channels.stop} of 300 divide {size} weights of a row,"
        " which share a scale"
    )
    assert "fewer ranks" in caught.value.hint


def test_channels_of_experts_with_biases_are_refused() -> None:
    with pytest.raises(ModelError, match="biases"):
        created(checkpoint(has_bias=True), ONE, local_channels=range(75))


def test_outputs_of_all_channels_add_up() -> None:
    """To 1e-5 of the largest: fp32 sums over 150 channels, made of two."""
    model = checkpoint(dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, model.hidden, generator=generator)
    ids, weights = routing(5, model.num_experts)
    method, layer = loaded(model, ONE)
    expected = method.apply(layer, x, ids, weights)
    found = torch.zeros_like(expected)
    for channels in (range(75), range(75, 150)):
        method, layer = created(model, ONE, local_channels=channels)
        arrive(method, layer, model)
        method.process_weights_after_loading(layer, activation="silu")
        found += method.apply(layer, x, ids, weights)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("projection", "index", "says"),
    [
        ("up", (80, 2), r"up_proj\.weight, from row 75: nan at \[5, 2\]"),
        ("down", (4, 3), r"down_proj\.weight: nan at \[4, 3\]"),  # of another rank's columns
    ],
)
def test_damage_among_channels(projection: str, index: tuple[int, int], says: str) -> None:
    model = checkpoint()
    model.weights[1, projection][index] = math.nan
    method, layer = created(model, ONE, local_channels=range(75, 150))
    with pytest.raises(NonFiniteError, match=says):
        arrive(method, layer, model)


@pytest.mark.parametrize(
    ("projection", "shape"), [("gate", (74, 140)), ("up", (150, 139)), ("down", (140, 75))]
)
def test_local_channels_of_another_shape(projection: Projection, shape: tuple[int, int]) -> None:
    method, layer = created(checkpoint(), ONE, local_channels=range(75))
    with pytest.raises(
        CheckpointError, match=rf"{projection}: shape|{projection}, from row 0: shape"
    ):
        method.load_expert(layer, 0, projection, torch.zeros(shape), projection)


def test_kernels_that_find_the_scale_themselves_never_see_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Theirs would be the scale of the columns. Here they are a stand-in: a GPU has them."""
    seen: list[matrices.Place] = []
    monkeypatch.setattr(matrices, "_has_kernel", lambda codes: True)
    monkeypatch.setattr(matrices, "_on_gpu", lambda _, places, grain: seen.extend(places))
    model = checkpoint()
    method, layer = created(model, ONE, local_channels=range(75))
    arrive(method, layer, model)
    monkeypatch.undo()
    whole = loaded(model, ONE)[1]
    assert {place.weight.shape for place in seen} == {(75, 140)}
    assert len(seen) == 2 * model.num_experts
    assert torch.equal(layer.w2_codes, whole.w2_codes[:, :, :75])


@pytest.mark.parametrize("local", [[1, 1], [0, 4], [-1]])
def test_local_experts_that_cannot_be_are_refused(local: list[int]) -> None:
    with pytest.raises(ModelError, match="local experts"):
        method_of(ONE).create_weights(
            nn.Module(), num_experts=4, hidden_size=8, intermediate_size=8, local_experts=local
        )


def test_activation_that_no_kernel_knows_is_refused_before_a_token() -> None:
    method, layer = method_of(ONE), nn.Module()
    method.create_weights(layer, num_experts=1, hidden_size=8, intermediate_size=8)
    with pytest.raises(ModelError, match="swiglu"):
        method.process_weights_after_loading(layer, activation="swiglu")
