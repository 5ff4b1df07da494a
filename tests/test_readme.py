"""The README's own code runs, and its tables are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from moeq.cli import cli
from moeq.embedded import model_folder
from moeq.schemes import OnlineQuantScheme

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_transformers_and_reload_blocks_run(tmp_path: Path) -> None:
    online, reload = blocks("python")
    saved = str(tmp_path / "saved")
    code = online.replace("Qwen/Qwen3-30B-A3B", str(model_folder()))
    code += f"\nmodel.save_pretrained({saved!r})\n" + reload.replace("folder", saved)
    assert saved in code and str(model_folder()) in code
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "def read_lines(path):" in result.stdout
    assert "100% of expert weights quantized" in result.stdout


def test_commands_have_the_options_that_are_shown() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("moeq ")]
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line)
        known = {option for p in cli.commands[name].params for option in p.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_scheme_table_is_the_schemes() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == {scheme.value for scheme in OnlineQuantScheme}
    for name, rest in rows:
        scheme = OnlineQuantScheme(name)
        weights, _, activations, moe, linear = (cell.strip() for cell in rest.split("|"))
        assert weights.startswith("int8" if "int8" in str(scheme.weight_dtype) else "fp8")
        assert (activations != "as they are") == scheme.quantizes_activations
        assert (moe == "yes", linear == "yes") == (scheme.covers("moe"), scheme.covers("linear"))


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
