"""Every architecture of `models.py`, loaded by moeq, against what transformers computes itself.

The yardstick is a plain model that carries our dequantized weights, put into the layout of its own
modules by the few lines below: nothing of the engine is used to judge the engine. All checkpoints
are bf16, as published ones are; models run in fp32 where numbers are compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moeq import OnlineQuantizationConfig, report_of, save
from moeq.engines import hf_stream
from moeq.experts import ExpertWeights
from moeq.schemes import Granularity, OnlineQuantScheme
from tests.engines.models import ARCHITECTURES, VOCABULARY, Architecture
from tests.engines.tools import assert_same_state
from tests.quantized import acting, quantized

INT8 = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
FP8 = (
    OnlineQuantScheme.FP8_PER_TENSOR,
    OnlineQuantScheme.FP8_PER_CHANNEL,
    OnlineQuantScheme.FP8_PER_BLOCK,
)
EVERY_SCHEME = pytest.mark.parametrize(
    "scheme", (INT8, *FP8, INT4), ids=lambda scheme: scheme.value
)

TOLERANCE = 1e-5
"""Relative, in fp32. Both sides add the same products in another order, over at most 160 terms and
two layers: about 1e-6. One wrong row of one expert shows as 1e-3 and more. (On CPUs fp8 schemes
leave activations alone, so this holds for them too.)"""


class Checkpoint:
    """One architecture on disk, as the hub has it and fused, and what it loads as."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.hub, self.fused = folder / "hub", folder / "fused"
        model = architecture.make().to(torch.bfloat16)
        model.save_pretrained(self.hub)
        model.save_pretrained(self.fused, save_original_format=False)
        self.plain = architecture.model_class.from_pretrained(self.hub, dtype=torch.float32)
        self.input_ids = torch.randint(3, VOCABULARY, (2, 9))
        self._loaded: dict[OnlineQuantScheme, Any] = {}

    def load(self, scheme: OnlineQuantScheme, path: Path, **kwargs: Any) -> Any:
        config = OnlineQuantizationConfig(scheme)
        kwargs = {"dtype": torch.float32} | kwargs
        return self.architecture.model_class.from_pretrained(
            path, quantization_config=config, **kwargs
        )

    def quantized(self, scheme: OnlineQuantScheme) -> Any:
        """From the hub's layout, in fp32; the same one for all tests that only read it."""
        if scheme not in self._loaded:
            self._loaded[scheme] = self.load(scheme, self.hub)
        return self._loaded[scheme]

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=self.input_ids)[0]

    def experts(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Pairs of a plain experts module and its quantized counterpart."""
        for name in self.architecture.experts:
            yield self.plain.get_submodule(name), model.get_submodule(name)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda row: row.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture: Architecture = request.param
    if architecture.missing:
        pytest.skip(architecture.missing)
    return Checkpoint(architecture, tmp_path_factory.mktemp(architecture.name))


def test_the_table_says_how_checkpoints_look(checkpoint: Checkpoint) -> None:
    """Else the two layouts of the other tests could be one and the same."""
    with safe_open(checkpoint.hub / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(re.search(r"experts\.0\.", name) for name in names) == (
        checkpoint.architecture.per_expert
    )
    with safe_open(checkpoint.fused / "model.safetensors", "pt") as file:
        assert not any(re.search(r"experts\.0\.", name) for name in file.keys())  # noqa: SIM118


@EVERY_SCHEME
def test_codes_are_those_of_the_weights(checkpoint: Checkpoint, scheme: OnlineQuantScheme) -> None:
    """Whatever lies on disk and however the module would have held it, to the bit."""
    fused = checkpoint.load(scheme, checkpoint.fused)
    for (plain, ours), (_, from_fused) in zip(
        checkpoint.experts(checkpoint.quantized(scheme)), checkpoint.experts(fused), strict=True
    ):
        expected = expected_weights(checkpoint.architecture, plain, scheme)
        for model in (ours, from_fused):
            found = model._moeq_method.weights(model)
            for name, tensor in vars(expected).items():
                assert_same(getattr(found, name), tensor, name)


@EVERY_SCHEME
def test_logits_are_those_of_the_dequantized_weights(
    checkpoint: Checkpoint, scheme: OnlineQuantScheme
) -> None:
    model = checkpoint.quantized(scheme)
    expected = checkpoint.logits(dequantized(checkpoint, model, scheme))
    assert relative_difference(checkpoint.logits(model), expected) < TOLERANCE
    assert relative_difference(checkpoint.logits(checkpoint.plain), expected) > 30 * TOLERANCE, (
        "weights so unimportant that nothing was tested"
    )


@EVERY_SCHEME
def test_what_is_quantized_and_what_is_not(
    checkpoint: Checkpoint, scheme: OnlineQuantScheme
) -> None:
    model, plain = checkpoint.quantized(scheme), checkpoint.plain
    wanted = set(checkpoint.architecture.experts)
    if scheme.covers("linear"):
        wanted |= {
            name
            for name, module in plain.named_modules()
            if type(module) is nn.Linear and module is not plain.get_output_embeddings()
            if not name.endswith(checkpoint.architecture.kept or "nothing")
        }
    assert {name for name, m in model.named_modules() if hasattr(m, "_moeq_method")} == wanted

    ours = {
        f"{name}.{parameter}"
        for name in wanted
        for parameter, _ in plain.get_submodule(name).named_parameters(recurse=False)
        if name in checkpoint.architecture.experts or parameter == "weight"
    }
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        if name not in ours:
            assert_same(state[name], tensor, name)


def test_experts_take_half_the_bytes_of_bf16(checkpoint: Checkpoint) -> None:
    model = checkpoint.load(INT8, checkpoint.hub, dtype=torch.bfloat16)
    before = after = 0
    for plain, ours in checkpoint.experts(model):
        weights = ours._moeq_method.weights(ours)
        stored = [weights.w13, weights.w2, weights.w13_scale, weights.w2_scale]
        after += sum(tensor.nbytes for tensor in stored)
        codes = weights.w13.numel() + weights.w2.numel()
        rows = weights.w13[..., 0].numel() + weights.w2[..., 0].numel()
        assert sum(tensor.nbytes for tensor in stored) == codes + 4 * rows
        before += 2 * sum(p.numel() for p in plain.parameters(recurse=False) if p.ndim == 3)
    report = report_of(model)
    assert report.coverage == 1.0
    assert report.expert_bytes_before == before
    assert report.expert_bytes_after == after
    assert after < 0.55 * before + 4 * rows * len(checkpoint.architecture.experts)


@pytest.mark.parametrize("scheme", (INT8, FP8[-1], INT4), ids=lambda scheme: scheme.value)
def test_saving_and_loading_again_changes_nothing(
    checkpoint: Checkpoint, scheme: OnlineQuantScheme, tmp_path: Path
) -> None:
    model = checkpoint.load(scheme, checkpoint.hub, dtype=checkpoint.architecture.half_dtype)
    save(model, tmp_path / "saved")
    again = checkpoint.architecture.model_class.from_pretrained(
        tmp_path / "saved", variant="moeq", dtype=checkpoint.architecture.half_dtype
    )
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert_same(tensor, model.state_dict()[name], name)
    assert_same(checkpoint.logits(again), checkpoint.logits(model), "logits")
    if model.can_generate():
        arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        tokens = model.generate(checkpoint.input_ids, **arguments)
        assert tokens.shape == (2, 13)
        assert_same(again.generate(checkpoint.input_ids, **arguments), tokens, "tokens")


VARIED = pytest.mark.parametrize(
    "checkpoint",
    [
        row
        for row in ARCHITECTURES
        if row.name
        in ("mixtral", "deepseek_v3", "gpt_oss", "aria", "nemotron_h", "gemma4", "muse_spark")
    ],
    ids=lambda row: row.name,
    indirect=True,
)
"""One architecture of every layout: for what does not depend on the family."""


def test_what_is_kept_streams_to_the_same_model(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU everything is streamed, not only what is quantized; here without one."""
    monkeypatch.setattr(hf_stream, "streams_kept", lambda device: True)
    for dtype in (torch.bfloat16, torch.float32):
        for path in (checkpoint.hub, checkpoint.fused):
            with monkeypatch.context() as patch:
                patch.setattr(hf_stream, "streams_kept", lambda device: False)
                expected = checkpoint.load(INT8, path, dtype=dtype)
            found = checkpoint.load(INT8, path, dtype=dtype)
            assert_same_state(found, expected)
            assert torch.equal(found(checkpoint.input_ids)[0], expected(checkpoint.input_ids)[0])


@VARIED
def test_the_ground_truth_says_the_same(checkpoint: Checkpoint) -> None:
    config = OnlineQuantizationConfig(INT8, backend="reference")
    model = checkpoint.architecture.model_class.from_pretrained(
        checkpoint.hub, dtype=torch.float32, quantization_config=config
    )
    assert set(report_of(model).kernels.values()) == {"reference"}
    expected = checkpoint.logits(checkpoint.quantized(INT8))
    assert relative_difference(checkpoint.logits(model), expected) < TOLERANCE


@VARIED
@pytest.mark.parametrize("scheme", (INT8, FP8[0], INT4), ids=lambda scheme: scheme.value)
def test_bf16_activations(checkpoint: Checkpoint, scheme: OnlineQuantScheme) -> None:
    """As users run it, against fp32. bf16 keeps 8 bits: each of some ten roundings on the way
    through two layers adds 2^-9, 4 % leave room for the deepest of these models."""
    model = checkpoint.load(scheme, checkpoint.hub, dtype="auto")
    expected = checkpoint.logits(dequantized(checkpoint, checkpoint.quantized(scheme), scheme))
    assert relative_difference(checkpoint.logits(model), expected) < 0.04


@VARIED
def test_int8_activations(checkpoint: Checkpoint) -> None:
    """Rows of 16 to 160 activations in 127 steps: an error of about 1 % for every product, of
    which each layer has up to eight in a row."""
    scheme = OnlineQuantScheme.INT8_PER_CHANNEL
    model = checkpoint.load(scheme, checkpoint.hub)
    expected = checkpoint.logits(dequantized(checkpoint, model, scheme))
    assert 1e-3 < relative_difference(checkpoint.logits(model), expected) < 0.06


def expected_weights(
    architecture: Architecture, plain: nn.Module, scheme: OnlineQuantScheme
) -> ExpertWeights:
    """Codes, scales and biases of a plain experts module, from the formulas of `quantize`."""
    up = "gate_up_proj" if architecture.is_gated else "up_proj"
    parts = 2 if architecture.is_gated else 1
    tensors: list[Any] = []
    groups: list[Any] = []
    for name in (up, "down_proj"):
        weight = canonical(architecture, getattr(plain, name).detach(), name)
        # gate and up share a scale per tensor, and nothing else
        split = parts if name == up and scheme.granularity is not Granularity.TENSOR else 1
        halves = [half.contiguous() for half in weight.chunk(split, dim=1)]
        codes, scales, group = zip(*(quantized(half, scheme) for half in halves))
        tensors += [torch.cat(codes, 1), torch.cat(scales, 1) if split > 1 else scales[0]]
        groups.append(None if scheme.group is None else torch.cat(group, 1))
    biases: list[Any] = [None, None]
    if architecture.has_bias:
        biases = [deinterleaved(architecture, plain.gate_up_proj_bias), plain.down_proj_bias]
    return ExpertWeights(scheme, *tensors, *biases, *groups, parts=parts)


def dequantized(checkpoint: Checkpoint, model: nn.Module, scheme: OnlineQuantScheme) -> nn.Module:
    """The plain model, with the weights of a quantized one."""
    plain = copy.deepcopy(checkpoint.plain)
    architecture = checkpoint.architecture
    up = "gate_up_proj" if architecture.is_gated else "up_proj"
    for name in architecture.experts:
        experts, ours = plain.get_submodule(name), model.get_submodule(name)
        parts = 2 if architecture.is_gated else 1
        hidden = ours.w2_codes.shape[1]
        w13 = acting(ours, "w13", scheme, hidden, parts)
        w2 = acting(ours, "w2", scheme, ours.w13_codes.shape[1] // parts)
        if architecture.interleaved:
            w13 = torch.stack(w13.chunk(2, dim=1), dim=2).flatten(1, 2)
        if architecture.transposed:
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        with torch.no_grad():
            getattr(experts, up).copy_(w13)
            experts.down_proj.copy_(w2)
    for name, module in model.named_modules():
        if "weight_codes" in module._parameters:
            columns = plain.get_submodule(name).weight.shape[1]
            weight = acting(module, "weight", scheme, columns)
            assert_same(module.weight, weight, f"{name}.weight")
            plain.get_submodule(name).weight.data = weight
    return plain


def canonical(architecture: Architecture, weight: Tensor, name: str) -> Tensor:
    """A parameter of an experts module as [E, N, K], gate rows before up rows."""
    if architecture.transposed:
        weight = weight.transpose(1, 2)
    return weight if name == "down_proj" else deinterleaved(architecture, weight)


def deinterleaved(architecture: Architecture, weight: Tensor) -> Tensor:
    """[E, 2I, ...] with gate before up."""
    if not architecture.interleaved:
        return weight
    return torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(found: Any, expected: Any, name: str) -> None:
    """Equal to the bit; also two schemes, or nothing twice."""
    if not isinstance(expected, Tensor):
        assert found == expected, name
        return
    assert found.dtype == expected.dtype, (name, found.dtype, expected.dtype)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found, expected)]
    assert torch.equal(*as_bytes), name
