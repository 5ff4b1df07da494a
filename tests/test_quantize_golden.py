"""The bytes that every kernel, engine and saved checkpoint agrees on, worked out without moeq."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeq.schemes import Granularity, OnlineQuantScheme
from tests import e4m3, four_bits
from tests.quantized import quantized as quantized_by_moeq

TINY = [[1.0, -0.5, 0.25, 3.0], [0.0, -7.0, 1.75, 0.875]]

# 1 / (3/127) = 42.33, -21.17, 10.58; 1.75 / (7/127) = 31.75, 15.88
INT8_BY_ROW = [[42, -21, 11, 127], [0, -127, 32, 16]]
# 1 / (3/448) = 149.33 -> 144 = 1.125 * 2^7, -74.67 -> -72, 37.33 -> 36; 7/448 = 1/64 is exact
FP8_BY_ROW = [[0x71, 0xE9, 0x61, 0x7E], [0x00, 0xFE, 0x6E, 0x66]]
# everything times 64, exactly: 64, -32, 16, 192
FP8_AS_ONE = [[0x68, 0xE0, 0x58, 0x74], [0x00, 0xFE, 0x6E, 0x66]]

# Row 0: 3 is 1.5 * 2^10 of 2^-9, and -8 of -192 (0xF4: s 1, e 14, m 4). 512, -256 and 128 are -3, 1
# and -1 of that, 64 off each; -208 leaves 80 and 96 of the first two, -176 128 of the first, -224
# 96 of the last, and others. Row 1: -7 is -8 times 224 (0x76), and the others are multiples too.
# Codes + 8, the even column low: 5 9, 7 0; 8 0, 10 9; then 8 8 where nothing is.
INT4_BY_ROW = [[0x95, 0x07] + [0x88] * 14, [0x08, 0x9A] + [0x88] * 14]

# Row 0: halves, 2 -1 .5 6, exactly. Row 1: ones, 0 -6 2 1, off by 1, 1/4, 1/8; under twos -4 1 .5
# are as far off. A scale is 2^8 of its row's.
MXFP4_BY_ROW = [[0xA4, 0x71] + [0x00] * 14, [0xF0, 0x24] + [0x00] * 14]

GROUPS = {
    "int4_per_group_weight_only": [[0xF4], [0x76]],
    "mxfp4_weight_only": [[0x87], [0x87]],
}

GOLDEN = {
    "int8_per_channel_weight_only": (INT8_BY_ROW, [3 / 127, 7 / 127]),
    "int8_per_channel": (INT8_BY_ROW, [3 / 127, 7 / 127]),
    "fp8_per_channel": (FP8_BY_ROW, [3 / 448, 7 / 448]),
    "fp8_per_tensor": (FP8_AS_ONE, 7 / 448),
    "fp8_per_block": (FP8_AS_ONE, [[7 / 448]]),
    "int4_per_group_weight_only": (INT4_BY_ROW, [2.0**-9, 2.0**-8]),
    "mxfp4_weight_only": (MXFP4_BY_ROW, [2.0**-9, 2.0**-8]),
}


def quantized(
    weight: torch.Tensor, scheme: OnlineQuantScheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes as bytes, scales, and bytes of scales of groups."""
    codes, scale, group = quantized_by_moeq(weight, scheme)
    assert codes.dtype == scheme.weight_dtype
    bits = None if group is None else group.view(torch.uint8).numpy()
    return codes.view(torch.uint8).numpy(), scale.numpy(), bits


def test_the_golden_bytes_cover_every_scheme() -> None:
    assert sorted(GOLDEN) == sorted(scheme.value for scheme in OnlineQuantScheme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_tiny_matrix_has_exactly_these_bytes(name: str, dtype: torch.dtype) -> None:
    scheme = OnlineQuantScheme(name)
    codes, scale, group = quantized(torch.tensor(TINY, dtype=dtype), scheme)
    want_codes, want_scale = GOLDEN[name]
    np.testing.assert_array_equal(codes, np.array(want_codes).astype(np.int16).astype(np.uint8))
    # a/q in fp64 rounded to fp32 is a/q in fp32: both operands are exact.
    np.testing.assert_array_equal(scale, np.array(want_scale).astype(np.float32), strict=True)
    assert (group is None) is (scheme.group is None)
    if group is not None:
        assert group.tolist() == GROUPS[name]


def test_int8_rounds_ties_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, scale, _ = quantized(weight, OnlineQuantScheme.INT8_PER_CHANNEL)
    assert scale.tolist() == [1.0]
    assert codes.view(np.int8).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_fp8_rounds_ties_to_even_down_to_its_subnormals() -> None:
    least = 2.0**-9
    weight = [448.0, 17.0, 19.0, -17.0, 0.5 * least, 1.5 * least, 2.5 * least, least, 432.0]
    codes, scale, _ = quantized(torch.tensor([weight]), OnlineQuantScheme.FP8_PER_CHANNEL)
    assert scale.tolist() == [1.0]
    #          448   16 of 16|18   20    -16        0         2 * least  2 * least
    assert codes[0].tolist() == [0x7E, 0x58, 0x5A, 0xD8, 0x00, 0x02, 0x02, 0x01, 0x7E]


def by_hand(
    weight: np.ndarray, scheme: OnlineQuantScheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `quantized` gives for one matrix: group by group, in numpy's fp32."""
    if scheme.group is not None:
        codes, groups, scales = four_bits.encode(weight, scheme)
        return codes, scales, groups
    int8 = scheme.weight_dtype == torch.int8
    qmax = np.float32(127 if int8 else 448)
    n, k = weight.shape
    rows, columns = {
        Granularity.TENSOR: (n, k),
        Granularity.CHANNEL: (1, k),
        Granularity.BLOCK: (128, 128),
    }[scheme.granularity]
    codes = np.zeros((n, k), dtype=np.uint8)
    scales = np.zeros((-(-n // rows), -(-k // columns)), dtype=np.float32)
    for i, j in np.ndindex(scales.shape):
        here = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        group = weight[here].astype(np.float32)
        largest = np.abs(group).max()
        scale = max(largest / qmax, np.float32(2.0**-126)) if largest else np.float32(1)
        quotient = np.clip(group / scale, -qmax, qmax)
        if int8:
            codes[here] = np.rint(quotient).astype(np.int8).view(np.uint8)
        else:
            codes[here] = e4m3.encode(quotient)
        scales[i, j] = scale
    if scheme.granularity is Granularity.BLOCK:
        return codes, scales, None
    one = scales[:, 0] if scheme.granularity is Granularity.CHANNEL else scales[0, 0]
    return codes, one, None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_random_matrices_have_the_bytes_of_numpy(
    scheme: OnlineQuantScheme, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 150, 261, generator=generator)
    weight *= torch.randn(3, 150, 1, generator=generator).mul(4).exp()  # rows of all sizes
    weight[0, 7] = 0
    weight[1] = 0
    weight[2, :, :128] *= 2.0**-24  # subnormal in fp16
    if dtype != torch.float16:
        weight[2, 3] *= 2.0**-120  # subnormal in the others
    stored = weight.clamp(-6e4, 6e4).to(dtype)
    codes, scale, groups = quantized(stored, scheme)
    for expert in range(3):
        want_codes, want_scale, want_groups = by_hand(stored[expert].double().numpy(), scheme)
        if groups is not None:
            np.testing.assert_array_equal(groups[expert], want_groups)
        np.testing.assert_array_equal(codes[expert], want_codes)
        np.testing.assert_array_equal(scale[expert], want_scale)


def test_our_e4m3_is_that_of_torch() -> None:
    every = np.arange(256, dtype=np.uint8)
    as_torch = torch.from_numpy(every).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(e4m3.decode(every), as_torch)
    finite = every[np.isfinite(as_torch)]
    np.testing.assert_array_equal(e4m3.encode(e4m3.decode(finite)), finite)
