"""`moeq plan`: what it says is what a load does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import moeq
from moeq.checkpoint import hub
from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import read_headers
from moeq.cli import cli
from moeq.embedded import model_folder
from moeq.engines.load import empty_model
from moeq.engines.planning import cache_bytes, plan_load
from moeq.errors import CheckpointError
from moeq.schemes import OnlineQuantScheme

TINY = str(model_folder())


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


@pytest.mark.parametrize("scheme", OnlineQuantScheme, ids=lambda scheme: scheme.value)
def test_the_plan_is_what_the_load_then_does(scheme: OnlineQuantScheme) -> None:
    planned = run(TINY, "-q", scheme.value, "--json")["schemes"]
    assert [entry["scheme"] for entry in planned] == [scheme.value]
    model = moeq.load(TINY, scheme.value)
    report = moeq.report_of(model)
    (entry,) = planned
    assert entry["total_bytes"] == report.total_bytes_after
    assert entry["expert_bytes"] == report.expert_bytes_after
    assert entry["cpu_peak_bytes"] == report.peak_bytes_planned
    assert entry["coverage"] == report.coverage
    assert entry["kept"] == report.kept


def test_every_scheme_where_none_is_named() -> None:
    result = run(TINY, "--json")
    assert [e["scheme"] for e in result["schemes"]] == [s.value for s in OnlineQuantScheme]
    for entry in result["schemes"]:
        parts = entry["expert_bytes"] + entry["linear_bytes"] + entry["other_bytes"]
        assert parts == entry["total_bytes"] < result["checkpoint_bytes"]
        assert entry["fits"] == {place["name"]: True for place in result["places"]}
    assert result["read_bytes_per_second"] > 0


def test_what_is_printed_fits_a_terminal() -> None:
    lines = run(TINY).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "everything fits" in lines[-2]
    assert lines[-1] == "100% of expert weights would be quantized"


def test_the_cache_is_that_of_the_model() -> None:
    model = moeq.load(TINY, "int8_per_channel_weight_only")
    context = 256
    cache = __import__("transformers").StaticCache(
        config=model.config.get_text_config(), max_cache_len=context
    )
    with torch.inference_mode():
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(empty_model(model_folder()), context) == held


def test_advice_is_the_smallest_change() -> None:
    weights = {e["scheme"]: e for e in run(TINY, "--json")["schemes"]}
    least = min(weights.values(), key=lambda entry: entry["gpu_peak_bytes"])
    most = max(weights.values(), key=lambda entry: entry["gpu_peak_bytes"])

    def advice(memory: int, context: int) -> str:
        options = ("--memory", f"{memory}B", "--context", str(context), "--json")
        return str(run(TINY, *options)["advice"][0]["advice"])

    assert advice(10**9, 1) == "everything fits"
    assert advice(most["gpu_peak_bytes"] - 1, 1).startswith("fits with ")
    assert most["scheme"] not in advice(most["gpu_peak_bytes"] - 1, 1)
    found = advice(least["gpu_peak_bytes"], 10**6)
    assert found.startswith(f"fits with {least['scheme']} and --context ")
    tokens = int(found.rsplit(" ", 1)[1])
    assert advice(least["gpu_peak_bytes"], tokens).startswith("fits with ")
    assert advice(10**6, 1).startswith("nothing fits: ")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("24GiB", 24 << 30), ("1.5 kb", 1500), ("7B", 7), ("2TiB", 2 << 40)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert run(TINY, "-q", "fp8_per_block", "--memory", text, "--json")["places"][0]["bytes"] == (
        nbytes
    )


@pytest.mark.parametrize("text", ["", "24", "24 gigs", "-1GB", "1e9", "GB"])
def test_what_is_no_size(text: str) -> None:
    result = CliRunner().invoke(cli, ["plan", TINY, "--memory", text])
    assert result.exit_code == 2
    assert "is no size" in result.output


def test_a_model_on_the_hub_is_planned_from_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = read_headers(checkpoint_files(model_folder()))
    monkeypatch.setattr(hub, "remote_headers", lambda name: (model_folder(), specs))
    local, remote = run(TINY, "--json"), run("owner/model", "--json")
    assert remote["read_bytes_per_second"] is None
    for one, other in zip(local["schemes"], remote["schemes"], strict=True):
        assert one | {"read_seconds": None} == other


def test_remote_headers_are_the_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    specs = read_headers(checkpoint_files(model_folder()))
    files: dict[str, dict[str, Any]] = {}
    names = {dtype: name for name, dtype in hub_dtypes().items()}
    for spec in specs.values():
        info = TensorInfo(names[spec.dtype], list(spec.shape), (0, spec.nbytes))
        files.setdefault(spec.file.name, {})[spec.name] = info
    found = SafetensorsRepoMetadata(
        metadata=None,
        sharded=True,
        weight_map={name: spec.file.name for name, spec in specs.items()},
        files_metadata={f: SafetensorsFileMetadata({}, tensors) for f, tensors in files.items()},
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda *a, **k: found)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(model_folder() / "config.json")
    )
    folder, remote = hub.remote_headers("owner/model")
    assert folder == model_folder()
    assert remote.keys() == specs.keys()
    for name, spec in remote.items():
        assert (spec.dtype, spec.shape, spec.nbytes) == (
            specs[name].dtype,
            specs[name].shape,
            specs[name].nbytes,
        )
        assert spec.file == Path(specs[name].file.name)


def hub_dtypes() -> dict[str, torch.dtype]:
    from moeq.checkpoint.headers import DTYPES

    return DTYPES


def test_what_a_load_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        run(str(tmp_path))
    specs = read_headers(checkpoint_files(model_folder()))
    name = next(name for name in specs if ".experts." in name)
    with pytest.raises(CheckpointError, match="missing from the checkpoint"):
        plan_load(
            empty_model(model_folder()),
            {n: spec for n, spec in specs.items() if n != name},
            moeq.OnlineQuantizationConfig("fp8_per_tensor"),
            [torch.device("cpu")],
        )


def test_rows_that_groups_do_not_divide_are_named(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "tie_word_embeddings": True,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    names = ("int4_per_group_weight_only", "int8_per_channel_weight_only")
    arguments = (str(tmp_path), "-q", ",".join(names), "--linear", "none")
    (four, eight) = run(*arguments, "--json")["schemes"]
    rule = "rows are filled up with zeros: 40 to 64, 24 to 32 columns"
    layers = [f"model.layers.{index}.mlp.experts" for index in range(2)]
    assert four["filled"] == dict.fromkeys(layers, rule)
    assert eight["filled"] == {}
    line = f"{names[0]}: {layers[0]} + 1 more: {rule}"
    assert line in " ".join(run(*arguments).split())
    config = moeq.OnlineQuantizationConfig(moe=names[0])
    report = moeq.report_of(moeq.load(tmp_path, config))
    assert f"{layers[0]} + 1 more: {rule}" in report.notes
    assert report.total_bytes_after == four["total_bytes"]
