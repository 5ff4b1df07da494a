"""`moeq eval` and `moeq plan --quantization auto`: what they print and write, and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.cli.test_cli import moeq as run

from moeq import OnlineQuantizationConfig, load
from moeq.embedded import model_folder
from moeq.fidelity.page import render
from moeq.schemes import OnlineQuantScheme

MODEL = str(model_folder())
INT8 = "int8_per_channel_weight_only"


def json_of(*words: str) -> Any:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*words: str) -> str:
    done = run(*words)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_prints_a_row_for_the_original_and_each_scheme() -> None:
    done = run("eval", MODEL, "-q", f"{INT8},fp8_per_block", "--tokens", "1100")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["original", INT8, "fp8_per_block"]
    assert "over 1022 tokens of held-out text of the embedded model, windows of 512" in lines
    assert any(line.startswith("note: fp8_per_block: fp8 on a CPU") for line in lines)


def test_the_report_is_the_json(tmp_path: Path) -> None:
    text, page = tmp_path / "a <b>.txt", tmp_path / "report.html"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    words = ("eval", MODEL, "-q", INT8, "--text", str(text), "--tokens", "1024")
    result = json_of(*words, "--report", str(page))
    assert result["text"] == {"source": "a <b>.txt", "tokens": 1024, "scored": 1022, "window": 512}
    (scheme,) = result["schemes"]
    loaded = scheme["load"]
    assert loaded["final_bytes"] > 0.5 * result["reference"]["bytes"]
    assert len(loaded["timeline"]) > 3
    assert 0 < max(nbytes for _, nbytes in loaded["timeline"]) <= loaded["actual_peak_bytes"]
    assert page.read_text(encoding="utf-8") == render(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a <b>.txt", "report.html"]
    assert f"--report {page}" in result["command"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\x89PNG\xff", "not UTF-8 text"),
        (b"abc\0def", "binary"),
        (b"x = 1\n", "tokens, and one window is 512"),
        (None, "No such file"),
    ],
)
def test_bad_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    found = refused("eval", MODEL, "-q", INT8, "--text", str(text))
    assert message in found
    assert "hint:" in found


def test_bad_arguments(tmp_path: Path) -> None:
    assert "did you mean" in refused("eval", MODEL, "-q", "int8_per_chanel")
    assert "comes twice" in refused("eval", MODEL, "-q", f"{INT8},{INT8}")
    assert "is empty" in refused("eval", MODEL, "-q", f"{INT8},")
    assert "there is no folder" in refused("eval", MODEL, "--report", str(tmp_path / "no" / "r"))
    assert "is a folder" in refused("eval", MODEL, "--report", str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    assert "no text to compare on" in refused("eval", str(copy), "-q", INT8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    text = tmp_path / "text"
    text.write_text("x = 1\n" * 2000)
    assert "no tokenizer" in refused("eval", str(copy), "-q", INT8, "--text", str(text))
    assert "not a quantization config" in refused("eval", MODEL, "-q", "missing.json")
    assert "--text and --out are for" in refused("plan", MODEL, "--out", str(tmp_path / "x.json"))
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written" in refused("eval", MODEL, "--report", f"{tmp_path}/locked/r")


def test_writes_through_links_and_over_no_device(tmp_path: Path) -> None:
    words = ("eval", MODEL, "-q", INT8, "--tokens", "512", "--report")
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    assert "is there, and no file" in refused(*words, str(pipe))
    link.symlink_to(target)
    assert run(*words, str(link)).returncode == 0
    assert link.is_symlink()
    assert target.read_text().startswith("<!doctype html>")
    text = tmp_path / "text"
    text.write_text("x = 1\n" * 2000)
    assert "is the text" in refused(*words, str(text), "--text", str(text))


def test_refinements_hold_for_every_scheme_and_for_auto() -> None:
    result = json_of("eval", MODEL, "--linear", "none", "--ignore", "*.0.mlp.experts",
                     "--tokens", "512")  # fmt: skip
    assert len(result["schemes"]) == len(OnlineQuantScheme)
    assert {len(scheme["layers"]) for scheme in result["schemes"]} == {4}
    found = json_of("plan", MODEL, "-q", "auto", "--memory", "25MB", "--ignore", "*.0.mlp.experts")
    assert "model.layers.0.mlp.experts" not in found["chosen"]["layers"]
    assert "nothing to quantize" in refused("eval", MODEL, "--moe", "none", "--linear", "none")


def test_json_has_no_infinities(tmp_path: Path) -> None:
    """A perplexity beyond what a number holds."""
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    for file in copy.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] *= 1e4
        save_file(tensors, file, metadata={"format": "pt"})
    text = tmp_path / "text"
    text.write_text("x = 1\n" * 2000)
    done = run("eval", str(copy), "-q", INT8, "--tokens", "512", "--text", str(text), "--json")
    assert done.returncode == 0, done.stderr
    assert "Infinity" not in done.stdout
    assert "NaN" not in done.stdout


def test_a_chosen_mixture_is_a_config_for_every_command(tmp_path: Path) -> None:
    out = tmp_path / "mixture.json"
    words = ("plan", MODEL, "-q", "auto", "--memory", "24MB", "--out", str(out))
    result = json_of(*words)
    chosen = result["chosen"]
    config = OnlineQuantizationConfig.from_json(str(out))
    assert config.to_dict() == chosen["quantization"] == json.loads(out.read_text())
    assert result["schemes"][0]["fits"] == {"--memory": True}
    schemes = {layer["scheme"] for layer in chosen["layers"].values()}
    assert schemes == {None, INT8}
    assert 0 < chosen["error"] < 0.02
    printed = run(*words[:-2]).stdout
    assert re.search(rf"chosen by weights, .*\n +{INT8}: model\.layers\.\d", printed)
    assert load(model_folder(), str(out)).hf_quantizer.quantization_config == config
    found = json_of("eval", MODEL, "-q", f"{out},{INT8}", "--tokens", "1024")
    mixture, int8 = found["schemes"]
    assert mixture["bytes"] > int8["bytes"]
    assert {layer["name"] for layer in mixture["layers"]} < {x["name"] for x in int8["layers"]}
    done = run("generate", MODEL, "-q", str(out), "--prompt", "def f(", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "is a whole config" in refused("eval", MODEL, "-q", str(out), "--linear", "none")


def test_a_mixture_can_be_judged_by_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    words = ("plan", MODEL, "-q", "auto", "--memory", "24MB")
    found = json_of(*words, "--text", str(text))["chosen"]
    assert found["judged_by"] == "text"
    assert found["error"] != json_of(*words)["chosen"]["error"]


def test_when_nothing_fits() -> None:
    found = refused("plan", MODEL, "-q", "auto", "--memory", "5MB")
    assert "nothing fits" in found
    assert "hint:" in found
