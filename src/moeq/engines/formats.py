"""How quantized weights lie in files: moeq's own format, and compressed-tensors for others.

moeq's is codes and scales as a layer holds them. compressed-tensors has a tensor for each
projection of each expert, and is, by scheme,

    int8_per_channel               int-quantized: int8 weights, a scale a row, activations by token
    fp8_per_channel                float-quantized: the same with e4m3
    fp8_per_block                  float-quantized: a scale a block, activations by 128 columns
    int8_per_channel_weight_only   pack-quantized: four codes + 128 in an int32
    int4_per_group_weight_only     pack-quantized: eight codes + 8 in an int32, a bf16 scale a group
    mxfp4_weight_only              mxfp4-pack-quantized: two codes in a byte, an e8m0 scale a group

The format is that of https://github.com/vllm-project/compressed-tensors. Files hold the experts of
a layer one after the other, gate before up: what the format calls many tensors is one stretch of
bytes in moeq's own layout, so codes and scales are quantized straight into the file. But for scales
of groups: the format has one where moeq has two, their product, which bf16 holds exactly, and e8m0
from 2^-127 on: groups below become zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeq import mxfp4
from moeq.checkpoint.folder import (
    INDEX_NAME,
    QUANTIZED_INDEX,
    QUANTIZED_SINGLE,
    SINGLE_NAME,
    VARIANT,
)
from moeq.config import OnlineQuantizationConfig
from moeq.engines.hf_structure import Target
from moeq.errors import ConfigError, ModelError
from moeq.four_bits import GROUP_BYTES, groups
from moeq.methods.parameters import parameter
from moeq.plan import LayerPlan
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme

Entry = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor in a file."""

_PACKED = {
    OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY: 4,
    OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY: 8,
}
"""Codes in an int32."""

_SIGN = 0x80
"""Flipped, it makes int8 codes unsigned ones that are 128 more."""


class Format(Protocol):
    """How weights lie in files.

    Attributes:
        single: name of a checkpoint's only file.
        index: name of the index of several.
        stem: what the names of several begin with.
    """

    single: str
    index: str
    stem: str

    def check(self, plans: Mapping[str, LayerPlan]) -> None:
        """That the format has a word for everything."""

    def tensors(self, plan: LayerPlan, own: str, meta: Tensor) -> dict[str, Entry]:
        """What a layer's parameter `own`, which is like `meta`, is made of in a file, in the order
        of its bytes: "w13_codes", "w2_scale", "weight_codes", ... Where that is of another size it
        is for `finish` to write."""

    def shapes(self, plan: LayerPlan) -> dict[str, tuple[int, ...]]:
        """Shapes that the format wants as tensors, by their names."""

    def finish(self, plan: LayerPlan, layer: nn.Module, files: Mapping[str, Tensor]) -> None:
        """What is left to do once a layer is quantized; `files`: what its parameters are made of in
        the file, joined, in the shape of the parameter."""

    def config(
        self,
        config: OnlineQuantizationConfig,
        targets: list[Target],
        plans: Mapping[str, LayerPlan],
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json."""


class Moeq:
    """What `moeq.load` reads, and what others do not take for unquantized weights."""

    single, index, stem = QUANTIZED_SINGLE, QUANTIZED_INDEX, f"model.{VARIANT}"

    def check(self, plans: Mapping[str, LayerPlan]) -> None:
        """It has."""

    def tensors(self, plan: LayerPlan, own: str, meta: Tensor) -> dict[str, Entry]:
        """The parameter."""
        return {f"{plan.shape.name}.{own}": (meta.dtype, tuple(meta.shape))}

    def shapes(self, plan: LayerPlan) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def finish(self, plan: LayerPlan, layer: nn.Module, files: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def config(
        self,
        config: OnlineQuantizationConfig,
        targets: list[Target],
        plans: Mapping[str, LayerPlan],
    ) -> dict[str, Any]:
        """The config."""
        return config.to_dict()


class CompressedTensors:
    """What vLLM reads."""

    single, index, stem = SINGLE_NAME, INDEX_NAME, "model"

    def check(self, plans: Mapping[str, LayerPlan]) -> None:
        """That the format has a word for everything.

        Raises:
            ConfigError: a scheme that it lacks.
            ModelError: a checkpoint that does not store experts one by one, or experts with biases.
        """
        for plan in plans.values():
            name, scheme = plan.shape.name, plan.scheme
            if scheme.granularity is Granularity.TENSOR:
                raise ConfigError(
                    f"{name}: compressed-tensors has no experts with {scheme.value}",
                    hint="fp8_per_channel has it, and is more exact",
                )
            whole = scheme.group or _PACKED.get(scheme, 1)
            if any(k % whole for _, k in _shapes(plan)):
                raise ModelError(
                    f"{name}: rows of {_shapes(plan)} do not pack into whole words and groups:"
                    f" {whole} columns"
                )
            if plan.shape.kind == "linear":
                continue
            if plan.shape.has_bias or any(
                source.expert is None or source.transposed or source.part == "gate_up"
                for source in plan.sources
            ):
                raise ModelError(
                    f"{name}: compressed-tensors holds experts one by one and without biases; this"
                    " checkpoint does not",
                    hint="write moeq's own format",
                )

    def tensors(self, plan: LayerPlan, own: str, meta: Tensor) -> dict[str, Entry]:
        """A tensor for each projection of each expert."""
        stack, kind = own.split("_", 1)
        parts = {"w13": ("gate", "up"), "w2": ("down",), "weight": ("down",)}[stack]
        sources = sorted(
            (source for source in plan.sources if source.part in parts),
            key=lambda source: (source.expert or 0, parts.index(source.part)),
        )
        scheme = plan.scheme
        entries: dict[str, Entry] = {}
        for source in sources:
            base = source.spec.name.removesuffix(".weight")
            n, k = source.spec.shape
            if scheme.group is not None and kind == "scale":
                continue
            if kind == "group_scale":
                dtype = torch.uint8 if _is_mx(scheme) else torch.bfloat16
                entries[f"{base}.weight_scale"] = dtype, (n, groups(k))
            elif kind == "scale":
                by_block = scheme.granularity is Granularity.BLOCK
                grid = (-(-n // BLOCK), -(-k // BLOCK)) if by_block else (n, 1)
                entries[f"{base}.weight_scale"] = torch.float32, grid
            elif scheme in _PACKED:
                entries[f"{base}.weight_packed"] = torch.int32, (n, k // _PACKED[scheme])
            elif _is_mx(scheme):
                entries[f"{base}.weight_packed"] = torch.uint8, (n, k // 2)
            else:
                entries[f"{base}.weight"] = scheme.weight_dtype, (n, k)
        return entries

    def shapes(self, plan: LayerPlan) -> dict[str, tuple[int, ...]]:
        """Those of weights that are packed into words."""
        if plan.scheme not in _PACKED:
            return {}
        return {
            f"{source.spec.name.removesuffix('.weight')}.weight_shape": source.spec.shape
            for source in plan.sources
        }

    def finish(self, plan: LayerPlan, layer: nn.Module, files: Mapping[str, Tensor]) -> None:
        """Codes that are packed have no sign; groups have one scale."""
        for own, file in files.items():
            if own.endswith("_group_scale"):
                row = parameter(layer, own.replace("_group_scale", "_scale"))
                if _is_mx(plan.scheme):
                    _absolute(file, row, files[own.replace("_group_scale", "_codes")])
                else:
                    file.copy_(parameter(layer, own).float() * row[..., None])
            elif own.endswith("_codes") and plan.scheme in _PACKED and plan.scheme.group is None:
                file.view(torch.uint8).bitwise_xor_(_SIGN)

    def config(
        self,
        config: OnlineQuantizationConfig,
        targets: list[Target],
        plans: Mapping[str, LayerPlan],
    ) -> dict[str, Any]:
        """A group of layers for each scheme.

        Raises:
            ConfigError: schemes that the format cannot mix.
        """
        by_scheme: dict[OnlineQuantScheme, list[str]] = {}
        for target in targets:
            plan = plans[target.shape.name]
            names = {source.spec.name.removesuffix(".weight") for source in plan.sources}
            if target.shape.kind == "linear":
                patterns = sorted(names)
            else:
                patterns = sorted({_any_expert(name) for name in names})
            by_scheme.setdefault(target.scheme, []).extend(patterns)
        if not by_scheme:
            raise ConfigError(
                "nothing is left to quantize, which compressed-tensors has no word for",
                hint="ignore fewer layers",
            )
        formats = {_format(scheme) for scheme in by_scheme}
        if len(formats) > 1:
            raise ConfigError(
                f"one checkpoint cannot be {' and '.join(sorted(formats))}",
                hint="quantize experts and linears under schemes of one kind",
            )
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop(),
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": names, **_arguments(scheme)}
                for index, (scheme, names) in enumerate(by_scheme.items())
            },
            "ignore": [],
        }


FORMATS: dict[str, Format] = {"moeq": Moeq(), "compressed-tensors": CompressedTensors()}


def joined(parts: list[Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Tensors that lie one after the other, as one."""
    end = parts[0].data_ptr()
    for part in parts:
        assert part.data_ptr() == end, "tensors of one parameter lie apart"
        end += part.nbytes
    raw = parts[0].view(-1).view(torch.uint8)
    nbytes = end - parts[0].data_ptr()
    return raw.as_strided((nbytes,), (1,), raw.storage_offset()).view(dtype).view(shape)


def _any_expert(name: str) -> str:
    """model.layers.0.mlp.experts.7.up_proj -> that of every expert, as a regular expression."""
    layer, _, part = name.rsplit(".", 2)
    return rf"re:{re.escape(layer)}\.\d+\.{re.escape(part)}$"


def _is_mx(scheme: OnlineQuantScheme) -> bool:
    """Whether scales of groups are powers of two."""
    return scheme.group_dtype == torch.float8_e8m0fnu


def _absolute(group_scale: Tensor, row: Tensor, codes: Tensor) -> None:
    """Make e8m0 scales [..., N, G] that are relative to those of rows, fp32 powers of two [..., N],
    what they are together. A group that e8m0 has no scale for has weights below 2^-124: its codes
    [..., N, 16 * G] become zeros."""
    byte = group_scale.view(torch.uint8)
    exponent = byte.int().add_((row.view(torch.int32) >> 23)[..., None] - 127)
    lost = (exponent < 0)[..., None]
    codes.view(*byte.shape, GROUP_BYTES).masked_fill_(lost, mxfp4.ZERO)
    byte.copy_(exponent.clamp_(min=0))


def _format(scheme: OnlineQuantScheme) -> str:
    if _is_mx(scheme):
        return "mxfp4-pack-quantized"
    if scheme in _PACKED:
        return "pack-quantized"
    return "int-quantized" if scheme.weight_dtype == torch.int8 else "float-quantized"


def _arguments(scheme: OnlineQuantScheme) -> dict[str, Any]:
    is_float = scheme.weight_dtype == torch.float8_e4m3fn or _is_mx(scheme)
    kind = "float" if is_float else "int"
    by_block = scheme.granularity is Granularity.BLOCK
    common = {"num_bits": 8 if scheme.group is None else 4, "type": kind, "symmetric": True}
    weights: dict[str, Any] = common | {"strategy": "channel", "dynamic": False}
    inputs: dict[str, Any] | None = common | {"strategy": "token", "dynamic": True}
    if by_block:
        weights |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        inputs = common | {"strategy": "group", "group_size": BLOCK, "dynamic": True}
    if not scheme.quantizes_activations:
        inputs = None
    if scheme.group is not None:
        weights |= {"strategy": "group", "group_size": scheme.group}
        if _is_mx(scheme):
            weights["scale_dtype"] = "torch.uint8"
    elif scheme in _PACKED:
        weights["group_size"] = -1  # a row; vLLM 0.26 takes a missing one for a number
    return {"weights": weights, "input_activations": inputs, "output_activations": None}


def _shapes(plan: LayerPlan) -> list[tuple[int, int]]:
    shape = plan.shape
    parts = ("gate", "down") if shape.kind == "moe" else ("down",)
    return [shape.matrix_shape(part) for part in parts]  # type: ignore[arg-type]
