"""Which scheme for which layer: shorthands, patterns, and what is refused."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

from moeq.config import OnlineQuantizationConfig, matches
from moeq.errors import ConfigError, PatternError, UnknownSchemeError
from moeq.methods.four_bits import Int4OnlineMoEMethod, Mxfp4OnlineMoEMethod
from moeq.methods.fp8 import (
    Fp8PerBlockOnlineMoEMethod,
    Fp8PerChannelOnlineMoEMethod,
    Fp8PerTensorOnlineMoEMethod,
)
from moeq.methods.integers import Int8OnlineMoEMethod, Int8W8A8OnlineMoEMethod
from moeq.methods.linear import OnlineLinearMethod
from moeq.schemes import OnlineQuantScheme, _warn_alias

Config = OnlineQuantizationConfig

EXPERTS = "model.layers.3.mlp.experts"
QKV = "model.layers.3.self_attn.q_proj"

MOE_METHODS = {
    "int8_per_channel_weight_only": Int8OnlineMoEMethod,
    "int8_per_channel": Int8W8A8OnlineMoEMethod,
    "int4_per_group_weight_only": Int4OnlineMoEMethod,
    "mxfp4_weight_only": Mxfp4OnlineMoEMethod,
    "fp8_per_tensor": Fp8PerTensorOnlineMoEMethod,
    "fp8_per_channel": Fp8PerChannelOnlineMoEMethod,
    "fp8_per_block": Fp8PerBlockOnlineMoEMethod,
}


def names_of(config: Config) -> tuple[str | None, str | None]:
    """The schemes that experts and linears get."""
    moe, linear = config.scheme_for(EXPERTS, "moe"), config.scheme_for(QKV, "linear")
    return moe and moe.value, linear and linear.value


@pytest.mark.parametrize(
    ("arguments", "moe", "linear"),
    [
        ({"quantization": "fp8_per_channel"}, "fp8_per_channel", "fp8_per_channel"),
        (
            {"quantization": "int8_per_channel_weight_only"},
            "int8_per_channel_weight_only",
            None,  # does not cover linears
        ),
        ({"quantization": "fp8_per_block", "linear": "none"}, "fp8_per_block", None),
        ({"quantization": "fp8_per_block", "moe": "none"}, None, "fp8_per_block"),
        ({"moe": "fp8_per_tensor"}, "fp8_per_tensor", None),
        ({"linear": "int8_per_channel"}, None, "int8_per_channel"),
        (
            {"quantization": "fp8_per_block", "moe": "int8_per_channel_weight_only"},
            "int8_per_channel_weight_only",
            "fp8_per_block",
        ),
        (
            {"moe": OnlineQuantScheme.FP8_PER_TENSOR, "linear": OnlineQuantScheme.FP8_PER_BLOCK},
            "fp8_per_tensor",
            "fp8_per_block",
        ),
    ],
)
def test_shorthands_choose_by_kind(
    arguments: dict[str, Any], moe: str | None, linear: str | None
) -> None:
    assert names_of(Config(**arguments)) == (moe, linear)


def test_the_old_name_configures_experts_only() -> None:
    _warn_alias.cache_clear()
    with pytest.warns(FutureWarning, match="use 'int8_per_channel_weight_only'") as caught:
        config = Config("experts_int8")
        again = Config(moe="experts_int8")
    assert len(caught) == 1
    assert names_of(config) == ("int8_per_channel_weight_only", None) == names_of(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is saved carries the new name
        assert Config.from_dict(config.to_dict()).moe is config.moe


def test_every_scheme_has_a_method_for_experts() -> None:
    assert sorted(MOE_METHODS) == sorted(scheme.value for scheme in OnlineQuantScheme)


@pytest.mark.parametrize("name", MOE_METHODS)
def test_get_quant_method_gives_every_layer_a_fresh_method(name: str) -> None:
    config = Config(name, backend="reference")
    first, second = (config.get_quant_method(EXPERTS, "moe") for _ in range(2))
    assert type(first) is MOE_METHODS[name]
    assert first.scheme.value == name
    assert first.backend == "reference"
    assert first is not second
    linear = config.get_quant_method(QKV, "linear")
    if name == "int8_per_channel_weight_only":
        assert linear is None
    else:
        assert type(linear) is OnlineLinearMethod
        assert (linear.scheme.value, linear.backend) == (name, "reference")


def test_get_quant_method_of_an_ignored_layer_is_none() -> None:
    assert Config("fp8_per_block", ignore=[EXPERTS]).get_quant_method(EXPERTS, "moe") is None


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("model.layers.1", "model.layers.10", False),
        ("*.mlp.experts", EXPERTS, True),  # the star crosses dots
        ("model.*.experts", EXPERTS, True),
        ("model.layers.[0-3].*", EXPERTS, True),
        ("model.layers.[0-2].*", EXPERTS, False),
        ("model.layers.?.mlp.experts", EXPERTS, True),
        ("*.MLP.experts", EXPERTS, False),
        ("mlp", EXPERTS, False),
        ("re:model", EXPERTS, True),  # from the start, not to the end
        ("re:experts", EXPERTS, False),
        (r"re:.*layers\.(3|4)\.", EXPERTS, True),
        (r"re:.*layers\.(3|4)$", EXPERTS, False),
        ("a[0]", "a[0]", True),  # an exact name wins over its reading as a glob
    ],
)
def test_patterns_are_exact_names_globs_or_regexes(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected
    assert Config("fp8_per_block", ignore=[pattern]).is_ignored(name) is expected


def test_globs_mind_case_even_where_file_names_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "normcase", str.lower)  # as on Windows
    assert not matches("*.MLP.experts", EXPERTS)


def test_ignore_wins_over_everything() -> None:
    assert names_of(Config("fp8_per_block", ignore=["re:.*attn"])) == ("fp8_per_block", None)
    config = Config(targets={EXPERTS: "fp8_per_block"}, ignore=["*experts"])
    assert names_of(config) == (None, None)


def test_ignoring_adds_and_leaves_the_original_alone() -> None:
    config = Config("fp8_per_block", ignore=["lm_head"], backend="reference")
    more = config.ignoring(["model.embed"])
    assert more.ignore == ("lm_head", "model.embed")
    assert more.backend == "reference"
    assert config.ignore == ("lm_head",)


def test_the_first_target_that_matches_wins_and_the_rest_stays_as_it_is() -> None:
    config = Config(
        targets={"re:.*layers.3.mlp": "fp8_per_block", "*experts": "fp8_per_channel"},
    )
    assert names_of(config) == ("fp8_per_block", None)
    other = config.scheme_for("model.layers.4.mlp.experts", "moe")
    assert other is OnlineQuantScheme.FP8_PER_CHANNEL


@pytest.mark.parametrize("also", ["quantization", "moe", "linear"])
def test_targets_exclude_the_other_ways_of_choosing(also: str) -> None:
    with pytest.raises(ConfigError, match="targets exclude quantization, moe and linear"):
        Config(targets={"*": "fp8_per_block"}, **{also: "fp8_per_block"})


def test_a_target_whose_scheme_does_not_cover_the_layer_is_an_error() -> None:
    config = Config(targets={"*q_proj": "int8_per_channel_weight_only"})
    with pytest.raises(ConfigError) as caught:
        config.scheme_for(QKV, "linear")
    assert caught.value.message == (
        f"target '*q_proj' matches {QKV}, but int8_per_channel_weight_only does not cover"
        " linear layers"
    )
    assert "int8_per_channel" in caught.value.hint.split(": ")[1].split(", ")


def test_a_scheme_asked_for_a_kind_that_it_does_not_cover_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not cover linear layers"):
        Config(linear="int8_per_channel_weight_only")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"quantization": "int8_per_channel_weight_only", "moe": "none"},
        {"moe": "none", "linear": "none"},
        {"targets": {}},
        {"ignore": ["lm_head"]},
    ],
)
def test_a_config_that_quantizes_nothing_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="quantizes nothing"):
        Config(**arguments)


def test_unknown_schemes_are_refused_wherever_they_stand() -> None:
    for wrong in ("int4", ["fp8_per_block"], 8):
        for arguments in ({"quantization": wrong}, {"moe": wrong}, {"targets": {"*": wrong}}):
            with pytest.raises(UnknownSchemeError) as caught:
                Config(**arguments)  # type: ignore[arg-type]
            assert caught.value.message == f"unknown quantization scheme {wrong!r}"


@pytest.mark.parametrize("empty", ["", "  ", None, 3])
def test_empty_patterns_are_refused(empty: Any) -> None:
    with pytest.raises(PatternError, match="empty pattern"):
        Config("fp8_per_block", ignore=[empty])
    with pytest.raises(PatternError, match="empty pattern"):
        Config(targets={empty: "fp8_per_block"})


def test_a_malformed_regex_is_refused_with_the_reason() -> None:
    with pytest.raises(PatternError, match=r"'re:\(attn'.*(unterminated|missing \))"):
        Config("fp8_per_block", ignore=["re:(attn"])


@pytest.mark.parametrize("ignore", ["lm_head", 3, None])
def test_ignore_is_a_list_of_patterns(ignore: Any) -> None:
    with pytest.raises(ConfigError, match=f"ignore is a list of patterns, found {ignore!r}"):
        Config("fp8_per_block", ignore=ignore)


@pytest.mark.parametrize("targets", ["*experts", ["*experts"], [], 3])
def test_targets_are_a_mapping(targets: Any) -> None:
    with pytest.raises(ConfigError, match="targets map patterns to schemes, found "):
        Config(targets=targets)


@pytest.mark.parametrize("pattern", ["model.layers.3.mlp.expert", "re:model.layers.3.mlp.expertz"])
def test_a_pattern_that_matches_nothing_names_the_nearest_layers(pattern: str) -> None:
    config = Config("fp8_per_block", ignore=[QKV, pattern])
    with pytest.raises(PatternError) as caught:
        config.check_patterns([QKV, EXPERTS, "lm_head"])
    assert caught.value.message == f"pattern {pattern!r} matches no layer of the model"
    assert caught.value.hint.startswith(f"near names: {EXPERTS}")
    assert "lm_head" not in caught.value.hint


def test_targets_that_match_nothing_are_refused_too() -> None:
    config = Config(targets={"*experts": "fp8_per_block", "zzz": "fp8_per_block"})
    with pytest.raises(PatternError, match="'zzz' matches no layer"):
        config.check_patterns([EXPERTS])
    Config(targets={"*experts": "fp8_per_block"}).check_patterns([EXPERTS, QKV])


def test_quant_method_makes_our_quantizer_known_to_transformers() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    assert Config("fp8_per_block").quant_method == "moeq"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["moeq"] is Config
    assert AUTO_QUANTIZER_MAPPING["moeq"].__name__ == "MoeqHfQuantizer"


@pytest.mark.parametrize("strict", ["no", 0, None])
def test_strict_is_a_bool(strict: Any) -> None:
    with pytest.raises(ConfigError, match="strict is true or false"):
        OnlineQuantizationConfig("fp8_per_channel", strict=strict)
