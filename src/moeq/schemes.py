"""The closed set of online quantization schemes: one row each.

A scheme says what a weight becomes (codes and scales), what happens to the activations that meet
it, and which kinds of layer it covers. Names and meaning are vLLM's; everything else in moeq reads
the properties of a scheme and never its name.
"""

from __future__ import annotations

import difflib
import enum
import functools
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from moeq.errors import UnknownSchemeError

LayerKind = Literal["moe", "linear"]
LAYER_KINDS: tuple[LayerKind, ...] = ("moe", "linear")

BLOCK = 128
"""Rows and columns of a weight, and columns of an activation, that share a scale under BLOCK."""


GROUP = 32
"""Columns of a row that share a scale of their own where codes have four bits."""


class Granularity(enum.Enum):
    """What shares one scale. `matrix` is one expert projection [N, K], or one linear weight."""

    TENSOR = "per tensor"  # one scale per matrix
    CHANNEL = "per channel"  # one scale per output row of a matrix
    BLOCK = "per block"  # one scale per 128 x 128 block of a matrix


@dataclass(frozen=True)
class _Row:
    weight_dtype: torch.dtype
    granularity: Granularity
    quantizes_activations: bool
    covers: tuple[LayerKind, ...]
    group_dtype: torch.dtype | None = None


class OnlineQuantScheme(enum.Enum):
    """What a weight becomes while it loads. The value is the name on the command line."""

    INT8_PER_CHANNEL_WEIGHT_ONLY = "int8_per_channel_weight_only"
    FP8_PER_TENSOR = "fp8_per_tensor"
    FP8_PER_CHANNEL = "fp8_per_channel"
    FP8_PER_BLOCK = "fp8_per_block"
    INT8_PER_CHANNEL = "int8_per_channel"
    INT4_PER_GROUP_WEIGHT_ONLY = "int4_per_group_weight_only"
    MXFP4_WEIGHT_ONLY = "mxfp4_weight_only"

    @classmethod
    def parse(cls, name: str | OnlineQuantScheme) -> OnlineQuantScheme:
        """The scheme called `name`, or by an old name, which warns once.

        Raises:
            UnknownSchemeError: with the nearest name.
        """
        if isinstance(name, cls):
            return name
        if isinstance(name, str) and name in ALIASES:
            _warn_alias(name)
            return ALIASES[name]
        try:
            return cls(name)
        except ValueError:
            known = [scheme.value for scheme in cls]
            alike = [o for o in known if o.partition("_")[0] == str(name).partition("_")[0]]
            near = difflib.get_close_matches(str(name), alike or known, n=1, cutoff=0.4)
            near = near or [other for other in known if name and other.startswith(str(name))]
            raise UnknownSchemeError(
                f"unknown quantization scheme {name!r}",
                hint=(f"did you mean {near[0]!r}? " if near else "") + "known: " + ", ".join(known),
            ) from None

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of the codes: `torch.int8` (symmetric, -127..127), `torch.float8_e4m3fn`, or
        `torch.uint8`, which holds two of four bits (see `moeq.four_bits`)."""
        return _TABLE[self].weight_dtype

    @property
    def granularity(self) -> Granularity:
        """What shares one fp32 weight scale."""
        return _TABLE[self].granularity

    @property
    def group(self) -> int | None:
        """Columns of a row that share a scale beneath the fp32 one; None where none do."""
        return None if self.group_dtype is None else GROUP

    @property
    def group_dtype(self) -> torch.dtype | None:
        """dtype of the scales of groups, which says what codes of four bits are."""
        return _TABLE[self].group_dtype

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized too, to the dtype of the codes: dynamically, per token
        (one scale per row), or per token and 128 columns under `Granularity.BLOCK`."""
        return _TABLE[self].quantizes_activations

    def covers(self, kind: LayerKind) -> bool:
        """Whether the scheme is defined for this kind of layer."""
        return kind in _TABLE[self].covers


_TABLE = {
    OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY: _Row(
        torch.int8, Granularity.CHANNEL, False, ("moe",)
    ),
    OnlineQuantScheme.FP8_PER_TENSOR: _Row(
        torch.float8_e4m3fn, Granularity.TENSOR, True, ("moe", "linear")
    ),
    OnlineQuantScheme.FP8_PER_CHANNEL: _Row(
        torch.float8_e4m3fn, Granularity.CHANNEL, True, ("moe", "linear")
    ),
    OnlineQuantScheme.FP8_PER_BLOCK: _Row(
        torch.float8_e4m3fn, Granularity.BLOCK, True, ("moe", "linear")
    ),
    OnlineQuantScheme.INT8_PER_CHANNEL: _Row(
        torch.int8, Granularity.CHANNEL, True, ("moe", "linear")
    ),
    OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY: _Row(
        torch.uint8, Granularity.CHANNEL, False, ("moe", "linear"), torch.float8_e4m3fn
    ),
    OnlineQuantScheme.MXFP4_WEIGHT_ONLY: _Row(
        torch.uint8, Granularity.CHANNEL, False, ("moe", "linear"), torch.float8_e8m0fnu
    ),
}

ALIASES = {"experts_int8": OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY}
"""Names that vLLM used before its online schemes had one vocabulary."""


@functools.cache
def _warn_alias(name: str) -> None:
    warnings.warn(
        f"quantization {name!r} is deprecated: use {ALIASES[name].value!r}",
        FutureWarning,
        stacklevel=4,
    )
