"""The quantized weights of one MoE layer, in the one layout that kernels see.

Legend: E experts (of this rank), H hidden size, I intermediate size, N rows and K columns of one
matrix, T tokens, k experts per token.

Whatever the checkpoint and the model's module look like (per expert or fused, transposed,
gate and up interleaved), weights are stored as

    w13 [E, 2I, H]   gate rows, then up rows, of every expert ([E, I, H] where there is no gate)
    w2  [E, H, I]    down

with codes contiguous along K, so that a kernel has one case to be fast for. Codes of four bits lie
two to a byte, in rows of `code_columns` bytes; on a CPU they can also be arranged for its kernels
(`moeq.kernels.cpu_int4`), which shows in their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeq import four_bits
from moeq.schemes import BLOCK, Granularity, OnlineQuantScheme


def code_columns(scheme: OnlineQuantScheme, k: int) -> int:
    """Elements of a row of codes, for K columns of weights."""
    return k if scheme.group is None else four_bits.packed(k)


def group_shape(scheme: OnlineQuantScheme, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of the group scales of weights `[..., N, K]`; None where there are none."""
    return None if scheme.group is None else (*shape[:-1], four_bits.groups(shape[-1]))


def blocks(n: int) -> int:
    """How many 128-wide blocks cover `n` rows or columns; the last may be partial."""
    return -(-n // BLOCK)


def scale_shape(
    granularity: Granularity, shape: tuple[int, ...], parts: int = 1
) -> tuple[int, ...]:
    """Shape of the scales of weights `[..., N, K]` made of `parts` projections stacked along N.

    TENSOR `[...]`; CHANNEL `[..., N]`; BLOCK `[..., parts * ceil(N / parts / 128), ceil(K / 128)]`:
    every projection has its own grid of blocks, so that gate and up never share one.
    """
    *lead, n, k = shape
    match granularity:
        case Granularity.TENSOR:
            return tuple(lead)
        case Granularity.CHANNEL:
            return (*lead, n)
        case Granularity.BLOCK:
            return (*lead, parts * blocks(n // parts), blocks(k))


@dataclass(frozen=True)
class ExpertWeights:
    """Codes, scales and biases of one MoE layer.

    Attributes:
        scheme: what the codes mean.
        w13: codes [E, P * I, code_columns(H)] in `scheme.weight_dtype`; P is `parts`.
        w13_scale: fp32, `scale_shape(granularity, [E, P * I, H], parts=P)`. Under TENSOR gate and
            up share the one scale of their expert.
        w2: codes [E, H, code_columns(I)].
        w2_scale: fp32, `scale_shape(granularity, [E, H, I])`.
        b13: bias [E, P * I] in the model's dtype, gate then up, or None.
        b2: bias [E, H], or None.
        w13_group: `scheme.group_dtype`, `group_shape([E, P * I, H])`, where there are groups.
        w2_group: `group_shape([E, H, I])`, likewise.
        parts: projections stacked in w13: 2 (gate, then up) or 1 (up alone).
    """

    scheme: OnlineQuantScheme
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    b13: Tensor | None = None
    b2: Tensor | None = None
    w13_group: Tensor | None = None
    w2_group: Tensor | None = None
    parts: int = field(kw_only=True)

    def __post_init__(self) -> None:
        (e, n, _), scheme = self.w13.shape, self.scheme
        h, i = self.hidden_size, self.intermediate_size
        assert self.parts in (1, 2) and n == self.parts * i, (n, self.parts)
        for name, weight, scale, group, shape, parts in (
            ("w13", self.w13, self.w13_scale, self.w13_group, (e, n, h), self.parts),
            ("w2", self.w2, self.w2_scale, self.w2_group, (e, h, i), 1),
        ):
            arranged = scheme.group is not None and weight.dtype == torch.int32
            assert arranged or weight.dtype == scheme.weight_dtype, (name, weight.dtype)
            found = (*shape[:2], code_columns(scheme, shape[2]) // (4 if arranged else 1))
            assert tuple(weight.shape) == found, (name, weight.shape, found)
            want = scale_shape(scheme.granularity, shape, parts)
            assert tuple(scale.shape) == want, (name, scale.shape, want)
            assert scale.dtype == torch.float32, (name, scale.dtype)
            assert scale.device == weight.device, (name, scale.device, weight.device)
            groups = None if group is None else tuple((group.mT if arranged else group).shape)
            assert groups == group_shape(scheme, shape), (name, groups)
            assert group is None or group.dtype == scheme.group_dtype, (name, group.dtype)
        assert self.b13 is None or self.b13.shape == (e, n), self.b13.shape
        assert self.b2 is None or self.b2.shape == (e, h), self.b2.shape

    @property
    def num_experts(self) -> int:
        """Experts held here: the local ones under expert parallelism."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.w13.shape[1] // self.parts

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds a gate beside up."""
        return self.parts == 2
