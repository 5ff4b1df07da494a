"""The one layout of expert weights: shapes of scales, and what `ExpertWeights` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeq.experts import ExpertWeights, blocks, code_columns, group_shape, scale_shape
from moeq.schemes import Granularity, OnlineQuantScheme

E, I, H = 3, 130, 260  # noqa: E741
INT4 = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY


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


@pytest.mark.parametrize(
    ("k", "columns", "count"),
    [(0, 0, 0), (1, 16, 1), (31, 16, 1), (32, 16, 1), (33, 32, 2), (64, 32, 2), (140, 80, 5)],
)
def test_rows_of_four_bits_are_filled_up_to_whole_groups(k: int, columns: int, count: int) -> None:
    for scheme in OnlineQuantScheme:
        if scheme.group_dtype is not None:
            assert code_columns(scheme, k) == columns
            assert group_shape(scheme, (3, 7, k)) == (3, 7, count)
        else:
            assert code_columns(scheme, k) == k
            assert group_shape(scheme, (3, 7, k)) is None


def fields(scheme: OnlineQuantScheme, parts: int = 2) -> dict[str, Any]:
    """Arguments of an `ExpertWeights` with biases, on the meta device."""
    w13_shape, w2_shape = (E, parts * I, H), (E, H, I)
    device = torch.device("meta")

    def codes(n: int, k: int) -> torch.Tensor:
        columns = code_columns(scheme, k)
        return torch.empty((E, n, columns), dtype=scheme.weight_dtype, device=device)

    def groups(*shape: int) -> torch.Tensor | None:
        found = group_shape(scheme, shape)
        return found and torch.empty(found, dtype=scheme.group_dtype, device=device)

    return {
        "scheme": scheme,
        "parts": parts,
        "w13": codes(parts * I, H),
        "w13_scale": torch.empty(scale_shape(scheme.granularity, w13_shape, parts), device=device),
        "w13_group": groups(*w13_shape),
        "w2": codes(H, I),
        "w2_group": groups(*w2_shape),
        "w2_scale": torch.empty(scale_shape(scheme.granularity, w2_shape), device=device),
        "b13": torch.empty(E, parts * I, dtype=torch.bfloat16, device=device),
        "b2": torch.empty(E, H, dtype=torch.bfloat16, device=device),
    }


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_expert_weights_know_what_they_hold(scheme: OnlineQuantScheme, parts: int) -> None:
    weights = ExpertWeights(**fields(scheme, parts))
    assert (weights.num_experts, weights.parts, weights.is_gated) == (E, parts, parts == 2)
    assert (weights.hidden_size, weights.intermediate_size) == (H, I)
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


def groups(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("parts", 1),
        ("w13", groups(E, 2 * I, H // 2, dtype=torch.uint8)),  # not filled up
        ("w13", groups(E, 2 * I, 144, dtype=torch.int8)),
        ("w2", groups(E, H, I, dtype=torch.uint8)),  # a byte for each
        ("w13_group", None),
        ("w2_group", None),
        ("w13_group", groups(E, 2 * I, 8)),  # of whole groups alone
        ("w13_group", groups(E, 2 * I, 9, dtype=torch.uint8)),
        ("w2_group", groups(E, H, 5, dtype=torch.float32)),
        ("w2_group", groups(E + 1, H, 5)),
    ],
)
def test_expert_weights_refuse_groups_that_do_not_fit(
    name: str, wrong: torch.Tensor | int | None
) -> None:
    with pytest.raises(AssertionError):
        ExpertWeights(**fields(INT4) | {name: wrong})


def test_only_four_bits_have_groups() -> None:
    bytes_each = fields(OnlineQuantScheme.INT8_PER_CHANNEL)
    with pytest.raises(AssertionError):
        ExpertWeights(**bytes_each | {"w13_group": groups(E, 2 * I, 9)})
