"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeq.embedded import model_folder
from moeq.schemes import OnlineQuantScheme

INT8 = "int8_per_channel_weight_only"


def moeq(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeq.cli", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 2, no traceback, nothing on stdout, and what the user needs to know."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for text in said:
        assert text in result.stderr, result.stderr


@pytest.mark.parametrize("command", [(), ("generate",), ("backends",), ("demo",)])
def test_help_of_every_command(command: tuple[str, ...]) -> None:
    result = moeq(*command, "--help")
    assert result.returncode == 0
    assert "Usage:" in result.stdout
    if command:
        assert "Example" in result.stdout


def test_generate_prints_text_alone_on_stdout() -> None:
    result = moeq("generate", str(model_folder()), "-q", INT8, "--prompt", "def add(a, b):\n",
                  "--max-new-tokens", "8")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "100% of expert weights quantized" in result.stderr
    assert "planned" in result.stderr and "actual" in result.stderr
    assert "expert" not in result.stdout


def test_generate_json_and_prompt_from_stdin() -> None:
    result = moeq("generate", str(model_folder()), "--moe", "fp8_per_block", "--json",
                  "--max-new-tokens", "4", stdin="import os\n")  # fmt: skip
    assert result.returncode == 0, result.stderr
    entry = json.loads(result.stdout)
    assert entry["prompt"] == "import os\n"
    assert entry["new_tokens"] <= 4
    assert entry["quantization"]["moe"] == "fp8_per_block"
    assert entry["quantization"]["linear"] == "none"
    assert entry["load"]["coverage"] == 1.0
    assert entry["load"]["expert_bytes_after"] < 0.55 * entry["load"]["expert_bytes_before"]


def test_backends_lists_every_scheme_and_reason() -> None:
    result = moeq("backends", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["scheme"] for row in rows} == {scheme.value for scheme in OnlineQuantScheme}
    assert all(row["backend"] == "cpu" for row in rows)
    assert all("named" in row["rejected"]["reference"] for row in rows)
    table = moeq("backends", "--device", "cuda")
    assert table.returncode == 0
    assert "triton" in table.stdout


def test_demo_measures_every_scheme_and_costs_little() -> None:
    result = moeq("demo", "--json", "--tokens", "4096")
    assert result.returncode == 0, result.stderr
    rows = {row["scheme"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["bf16", *(scheme.value for scheme in OnlineQuantScheme)]
    plain = rows.pop("bf16")
    for row in rows.values():
        assert row["expert_bytes"] < 0.52 * plain["expert_bytes"]
        assert row["peak_bytes"] > 0.95 * row["expert_bytes"]  # codes are not mapped from a file
        most = 1.03 if row["scheme"] == "mxfp4_weight_only" else 1.01
        assert row["perplexity"] < most * plain["perplexity"], row
        assert row["completion"].startswith("def fibonacci")


def test_unknown_scheme_suggests() -> None:
    result = moeq("generate", str(model_folder()), "-q", "fp8_per_chanel", "--prompt", "x")
    refused(result, "fp8_per_chanel", "did you mean 'fp8_per_channel'")


def test_old_name_works_and_names_its_successor() -> None:
    result = moeq("generate", str(model_folder()), "-q", "experts_int8", "--prompt", "x = ",
                  "--max-new-tokens", "2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"use '{INT8}'") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("-q", INT8, "--ignore", "model.layers.9.mlp.experts"), "matches no layer"),
        (("-q", INT8, "--ignore", "re:("), "re:("),
        (("--targets", "fp8_per_block"), "PATTERN=SCHEME"),
        (("-q", INT8, "--linear", INT8), "does not cover linear"),
        (("--ignore", "lm_head"), "without a scheme"),
        (("-q", INT8, "--device", "tpu9"), "unknown device"),
        (("-q", INT8, "--device", "cuda:9"), "cuda:9 is not there"),
        ((), "no scheme is named"),
        (("-q", INT8, "--max-new-tokens", "0"), "max-new-tokens"),
    ],
)
def test_bad_options_are_refused(args: tuple[str, ...], said: str) -> None:
    refused(moeq("generate", str(model_folder()), "--prompt", "x", *args), said)


def test_no_prompt_and_empty_prompt() -> None:
    refused(moeq("generate", str(model_folder()), "-q", INT8, stdin=""), "prompt is empty")


def test_folder_that_is_none(tmp_path: Path) -> None:
    refused(moeq("generate", str(tmp_path / "no"), "-q", INT8, "--prompt", "x"), "no such folder")
    refused(moeq("generate", str(tmp_path), "-q", INT8, "--prompt", "x"), "no config.json")


def test_hub_id_offline_and_uncached(tmp_path: Path) -> None:
    result = moeq("generate", "someone/some-moe", "-q", INT8, "--prompt", "x",
                  HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))  # fmt: skip
    refused(result, "someone/some-moe", "not in the local cache", "pass the path of a folder")


def test_no_tokenizer(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_folder(), broken)
    for file in broken.glob("tokenizer*"):
        file.unlink()
    refused(moeq("generate", str(broken), "-q", INT8, "--prompt", "x"), "no tokenizer")


def test_escapes_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    result = moeq("generate", str(tmp_path / "a\x1b[31mb"), "-q", INT8, "--prompt", "x")
    refused(result)
    assert "\x1b" not in result.stderr


def test_a_reader_that_goes_away_is_no_crash() -> None:
    command = f"{sys.executable} -m moeq.cli backends --json | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""
