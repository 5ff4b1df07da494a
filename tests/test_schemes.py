"""The closed set of schemes, and how names become them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from moeq.errors import UnknownSchemeError
from moeq.schemes import (
    ALIASES,
    BLOCK,
    GROUP,
    LAYER_KINDS,
    Granularity,
    OnlineQuantScheme,
    _warn_alias,
)

INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, torch.uint8

TABLE = {
    "int8_per_channel_weight_only": (INT8, Granularity.CHANNEL, False, ("moe",), None),
    "fp8_per_tensor": (FP8, Granularity.TENSOR, True, ("moe", "linear"), None),
    "fp8_per_channel": (FP8, Granularity.CHANNEL, True, ("moe", "linear"), None),
    "fp8_per_block": (FP8, Granularity.BLOCK, True, ("moe", "linear"), None),
    "int8_per_channel": (INT8, Granularity.CHANNEL, True, ("moe", "linear"), None),
    "int4_per_group_weight_only": (INT4, Granularity.CHANNEL, False, ("moe", "linear"), 32),
    "mxfp4_weight_only": (INT4, Granularity.CHANNEL, False, ("moe", "linear"), 32),
}


@pytest.fixture
def forgetful_alias() -> Iterator[None]:
    """As in a fresh process: no alias has warned yet."""
    _warn_alias.cache_clear()
    yield
    _warn_alias.cache_clear()


def test_these_are_all_the_schemes_in_this_order() -> None:
    assert [scheme.value for scheme in OnlineQuantScheme] == list(TABLE)
    assert LAYER_KINDS == ("moe", "linear")
    assert (BLOCK, GROUP) == (128, 32)


@pytest.mark.parametrize("name", TABLE)
def test_a_scheme_means_what_the_table_says(name: str) -> None:
    scheme = OnlineQuantScheme(name)
    found = (
        scheme.weight_dtype,
        scheme.granularity,
        scheme.quantizes_activations,
        tuple(kind for kind in LAYER_KINDS if scheme.covers(kind)),
        scheme.group,
    )
    assert found == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_parse_takes_names_and_schemes(name: str) -> None:
    scheme = OnlineQuantScheme.parse(name)
    assert scheme.value == name
    assert OnlineQuantScheme.parse(scheme) is scheme


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("int8_per_chanel", "int8_per_channel"),
        ("fp8_block", "fp8_per_block"),
        ("FP8_PER_TENSOR".lower().replace("_", "-"), "fp8_per_tensor"),
        ("int8_weight_only", "int8_per_channel_weight_only"),
        ("int4_weight_only", "int4_per_group_weight_only"),
        ("int4", "int4_per_group_weight_only"),
        ("mxfp4", "mxfp4_weight_only"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownSchemeError) as caught:
        OnlineQuantScheme.parse(wrong)
    assert repr(wrong) in caught.value.message
    assert caught.value.hint.startswith(f"did you mean {meant!r}? ")


@pytest.mark.parametrize("wrong", ["zzz", "", "none", 8])
def test_a_name_near_nothing_lists_what_there_is(wrong: object) -> None:
    with pytest.raises(UnknownSchemeError) as caught:
        OnlineQuantScheme.parse(wrong)  # type: ignore[arg-type]
    assert caught.value.hint.endswith("known: " + ", ".join(TABLE))


def test_the_only_alias_is_that_of_vllm() -> None:
    assert {"experts_int8": OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY} == ALIASES


@pytest.mark.usefixtures("forgetful_alias")
def test_the_alias_works_and_warns_once_naming_its_successor() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [OnlineQuantScheme.parse("experts_int8") for _ in range(3)]
    assert found == [OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY] * 3
    assert [warning.category for warning in caught] == [FutureWarning]
    assert str(caught[0].message) == (
        "quantization 'experts_int8' is deprecated: use 'int8_per_channel_weight_only'"
    )


def test_the_successor_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnlineQuantScheme.parse("int8_per_channel_weight_only")
