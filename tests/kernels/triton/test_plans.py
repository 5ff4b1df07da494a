"""Which path and tiling a number of tokens gets, and what happens on smaller GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources

import pytest
import torch

from moeq.schemes import OnlineQuantScheme
from tests.kernels.triton.device import DEVICE, HAS_GPU

W8A16 = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY
EVERY_SCHEME = pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)


def test_tables_are_in_order_and_end_open() -> None:
    text = resources.files("moeq.kernels.triton").joinpath("tilings.json").read_text()
    for name, family in json.loads(text).items():
        if name == "about":
            continue
        limits = [row["rows"] for row in family["gemm"]]
        assert limits == sorted(limits)
        assert limits[-1] >= 1e9
        slots = [row["top_k"] for row in family["gemv"]["down"]]
        assert slots == sorted(slots)


@EVERY_SCHEME
@pytest.mark.parametrize(("e", "k"), [(8, 2), (128, 8), (512, 10), (1, 1), (3, 3), (4096, 64)])
def test_every_number_of_tokens_has_a_path(scheme: OnlineQuantScheme, e: int, k: int) -> None:
    from moeq.kernels.triton import plans

    for t in (1, 2, 3, 7, 33, 500, 10_000, 1_000_000):
        plans.choose(DEVICE, scheme, torch.bfloat16, (t, k, e, 2048, 768))


def test_few_tokens_go_to_gemv_unless_they_share_experts() -> None:
    from moeq.kernels.triton import plans
    from moeq.kernels.triton.layer import GemmPath, GemvPath

    def path(t: int, k: int, e: int) -> type:
        return type(plans.choose(DEVICE, W8A16, torch.bfloat16, (t, k, e, 2048, 768)))

    assert path(1, 8, 128) is GemvPath
    assert path(4, 8, 128) is GemvPath
    assert path(5, 8, 128) is GemmPath
    assert path(1, 2, 8) is GemvPath
    assert path(4, 2, 2) is GemmPath


@pytest.mark.skipif(HAS_GPU, reason="the interpreter passes for a GPU without the library's")
def test_decoded_parts_only_where_the_library_has_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moeq.kernels.triton import plans
    from moeq.kernels.triton.layer import GemmPath, LibraryPath

    shape = (8192, 2, 8, 4096, 14336)
    choose = plans.choose.__wrapped__
    assert isinstance(choose(DEVICE, W8A16, torch.bfloat16, shape), GemmPath)
    monkeypatch.setattr(plans, "gpu", lambda device: plans.Gpu((9, 0), 227 << 10))
    assert isinstance(choose(DEVICE, W8A16, torch.bfloat16, shape), LibraryPath)
    assert isinstance(choose(DEVICE, W8A16, torch.float16, shape), GemmPath)
    few = (1024, 8, 128, 2048, 768)
    assert isinstance(choose(DEVICE, W8A16, torch.bfloat16, few), GemmPath)


def test_deep_weights_may_have_tilings_of_their_own() -> None:
    from moeq.kernels.triton import plans
    from moeq.kernels.triton.layer import GemmPath

    scheme = OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY
    at, above = (
        plans.choose(DEVICE, scheme, torch.bfloat16, (16, 2, 8, 4096, i))
        for i in (plans.DEEP, plans.DEEP + 1)
    )
    assert isinstance(at, GemmPath)
    assert isinstance(above, GemmPath)
    assert above.up == at.up
    assert above.down != at.down
    entry = next(row for row in plans._tilings()["decode_groups"]["gemm"] if row["rows"] >= 4.1)
    assert above.down.block_k == entry["deep"]["block_k"]
    assert at.down.block_k == entry["down"]["block_k"]


@EVERY_SCHEME
@pytest.mark.parametrize("kib", [64, 99, 163, 227])
def test_tilings_shrink_until_they_fit(scheme: OnlineQuantScheme, kib: int) -> None:
    from moeq.kernels.triton import plans
    from moeq.kernels.triton.layer import Gemm

    limit = kib << 10
    arithmetic = plans.arithmetic(DEVICE, scheme)
    for codes in {arithmetic.codes, False}:
        arithmetic = replace(arithmetic, codes=codes)
        sizes = plans._sizes(scheme, arithmetic, torch.bfloat16)
        assert plans.least_shared_memory(scheme, arithmetic, torch.bfloat16) <= 99 << 10
        for row in plans._tilings()[plans._family(scheme, arithmetic)]["gemm"]:
            for name in row.keys() & {"up", "down", "deep"}:
                asked = Gemm(**row[name])
                got = plans.fitted(asked, row["block_m"], sizes, limit)
                taken = plans.shared_memory(got, row["block_m"], sizes)
                assert taken <= limit or kib == 64
                assert got.stages >= 2
                assert math.log2(got.block_n).is_integer()
                if plans.shared_memory(asked, row["block_m"], sizes) <= limit:
                    assert got == asked
