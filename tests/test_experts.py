"""The one layout of expert weights: shapes of scales, and what `ExpertWeights` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeq.experts import ExpertWeights, blocks, scale_shape
from moeq.schemes import Granularity, OnlineQuantScheme

E, I, H = 3, 130, 260  # noqa: E741


@pytest.mark.parametrize(
    ("n", "count"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (256, 2), (257, 3)]
)
def test_blocks_round_up(n: int, count: int) -> None:
    assert blocks(n) == count


@pytest.mark.parametrize(
    ("granularity", "shape", "parts", "expected"),
    [
        (Granularity.TENSOR, (5, 7), 1, ()),
        (Granularity.TENSOR, (3, 10, 7), 2, (3,)),
        (Granularity.CHANNEL, (5, 7), 1, (5,)),
        (Granularity.CHANNEL, (3, 10, 7), 2, (3, 10)),
        (Granularity.BLOCK, (5, 7), 1, (1, 1)),
        (Granularity.BLOCK, (3, 260, 257), 1, (3, 3, 3)),
        (Granularity.BLOCK, (3, 260, 257), 2, (3, 4, 3)),  # 2 grids of ceil(130 / 128)
        (Granularity.BLOCK, (3, 256, 128), 2, (3, 2, 1)),
        (Granularity.BLOCK, (2, 3, 256, 128), 1, (2, 3, 2, 1)),
    ],
)
def test_scale_shape(
    granularity: Granularity, shape: tuple[int, ...], parts: int, expected: tuple[int, ...]
) -> None:
    assert scale_shape(granularity, shape, parts) == expected


def fields(scheme: OnlineQuantScheme, parts: int = 2) -> dict[str, Any]:
    """Arguments of an `ExpertWeights` with biases, on the meta device."""
    w13_shape, w2_shape = (E, parts * I, H), (E, H, I)
    device = torch.device("meta")
    return {
        "scheme": scheme,
        "w13": torch.empty(w13_shape, dtype=scheme.weight_dtype, device=device),
        "w13_scale": torch.empty(scale_shape(scheme.granularity, w13_shape, parts), device=device),
        "w2": torch.empty(w2_shape, dtype=scheme.weight_dtype, device=device),
        "w2_scale": torch.empty(scale_shape(scheme.granularity, w2_shape), device=device),
        "b13": torch.empty(E, parts * I, dtype=torch.bfloat16, device=device),
        "b2": torch.empty(E, H, dtype=torch.bfloat16, device=device),
    }


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_expert_weights_know_what_they_hold(scheme: OnlineQuantScheme, parts: int) -> None:
    weights = ExpertWeights(**fields(scheme, parts))
    assert (weights.num_experts, weights.parts, weights.is_gated) == (E, parts, parts == 2)
    without = ExpertWeights(**fields(scheme, parts) | {"b13": None, "b2": None})
    assert (without.b13, without.b2) == (None, None)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("w13", torch.empty(E, 2 * I + 1, H, dtype=torch.int8, device="meta")),
        ("w13", torch.empty(E, 2 * I, H, dtype=torch.float8_e4m3fn, device="meta")),
        ("w2", torch.empty(E + 1, H, I, dtype=torch.int8, device="meta")),
        ("w2", torch.empty(E, I, H, dtype=torch.int8, device="meta")),
        ("w13_scale", torch.empty(E, 2 * I, 1, device="meta")),
        ("w13_scale", torch.empty(E, 2 * I, dtype=torch.bfloat16, device="meta")),
        ("w13_scale", torch.empty(E, 2 * I, device="cpu")),  # on another device than the codes
        ("w2_scale", torch.empty(E + 1, H, device="meta")),  # sized by all experts, not by ours
        ("w2_scale", torch.empty(E, H, device="cpu")),
        ("b13", torch.empty(E, I, device="meta")),
        ("b2", torch.empty(E, I, device="meta")),
    ],
)
def test_expert_weights_refuse_what_does_not_fit(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        ExpertWeights(**fields(OnlineQuantScheme.INT8_PER_CHANNEL) | {name: wrong})
