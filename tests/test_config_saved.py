"""Configs as JSON: what is written into config.json, and what is read back from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeq.config import FORMAT_VERSION, OnlineQuantizationConfig
from moeq.errors import ConfigError
from tests.test_config import names_of

Config = OnlineQuantizationConfig

CONFIGS = [
    Config("fp8_per_channel"),
    Config("int8_per_channel_weight_only", ignore=["lm_head", "re:.*attn"]),
    Config(moe="int8_per_channel_weight_only", linear="fp8_per_block"),
    Config(linear="fp8_per_tensor"),
    Config(targets={"*experts": "fp8_per_block", "*q_proj": "int8_per_channel"}, ignore=["a"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_configs_survive_dict_and_json(config: Config) -> None:
    for again in (
        Config.from_dict(config.to_dict()),
        Config.from_json(json.dumps(config.to_dict())),
    ):
        assert again == config
        assert hash(again) == hash(config)
        assert repr(again) == repr(config)
        assert names_of(again) == names_of(config)
        assert again.ignore == config.ignore
    assert sum(config == other for other in CONFIGS) == 1


def test_the_order_of_targets_survives_a_config_json_with_sorted_keys(tmp_path: Path) -> None:
    # transformers writes config.json with sort_keys=True, and the first match wins.
    config = Config(targets={"re:.*layers.3.mlp": "fp8_per_block", "*experts": "fp8_per_channel"})
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"quantization_config": config.to_dict()}, sort_keys=True))
    again = Config.from_dict(json.loads(saved.read_text())["quantization_config"])
    assert list(again.targets) == list(config.targets)
    assert names_of(again) == ("fp8_per_block", None)


def test_targets_in_another_order_are_another_config() -> None:
    pairs = [("*experts", "fp8_per_block"), ("re:.*3.mlp", "fp8_per_channel")]
    assert Config(targets=dict(pairs)) != Config(targets=dict(reversed(pairs)))


def test_a_saved_config_says_whose_it_is_and_in_which_format() -> None:
    entries = Config("int8_per_channel", ignore=["lm_head"]).to_dict()
    assert entries == {
        "quant_method": "moeq",
        "format_version": 1,
        "moe": "int8_per_channel",
        "linear": "int8_per_channel",
        "ignore": ["lm_head"],
    }


def test_from_dict_takes_the_arguments_of_the_constructor_as_json_has_them() -> None:
    config = Config.from_dict({"quantization": "fp8_per_block", "backend": "reference"})
    assert names_of(config) == ("fp8_per_block", "fp8_per_block")
    assert config.backend == "reference"
    assert Config.from_json(" fp8_per_block\n") == config
    targets = {"*experts": "fp8_per_block"}
    assert Config.from_dict({"targets": targets}) == Config(targets=targets)


def test_from_dict_hands_back_what_transformers_passes_along() -> None:
    entries = Config("fp8_per_block").to_dict()
    before = dict(entries)
    config, rest = Config.from_dict(entries, return_unused_kwargs=True, device_map="cpu")
    assert config == Config("fp8_per_block")
    assert rest == {"device_map": "cpu"}
    assert entries == before


@pytest.mark.parametrize(
    ("entries", "message", "hint"),
    [
        ({"moe": "fp8_per_block", "ignored": []}, "unknown key 'ignored'", "mean 'ignore'?"),
        ({"moe": "fp8_per_block", "xyz": 1}, "unknown key 'xyz'", "known: quantization, moe"),
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq', expected 'moeq'", ""),
        (
            {"format_version": FORMAT_VERSION + 1, "moe": "fp8_per_block"},
            f"format {FORMAT_VERSION + 1}, this moeq reads format {FORMAT_VERSION}",
            "upgrade moeq",
        ),
        ({"targets": [["*experts"]]}, "pairs of pattern and scheme, found [['*experts']]", ""),
    ],
)
def test_from_dict_refuses_what_it_cannot_read(
    entries: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(entries)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_from_json_says_where_the_json_breaks() -> None:
    with pytest.raises(ConfigError, match=r"not JSON: .*line 1 column"):
        Config.from_json('{"moe": fp8}')
