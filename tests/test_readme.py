"""The README's own code runs, and its tables are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from moeq.embedded import model_folder
from moeq.schemes import OnlineQuantScheme

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_and_reload_blocks_run(tmp_path: Path) -> None:
    # The last two: tests/engines/ranks.py and test_lm_eval.py
    online, reload, refresh, _ranks, _lm_eval = blocks("python")
    saved = str(tmp_path / "saved")
    code = online.replace("Qwen/Qwen3-30B-A3B", str(model_folder()))
    code += f"\nimport moeq; moeq.save(model, {saved!r})"
    assert str(model_folder()) in code
    assert "def read_lines(path):" in python(code)
    # Another process, which has never quantized anything
    assert "100% of expert weights quantized" in python(reload.replace("folder", saved))
    code = online.replace("Qwen/Qwen3-30B-A3B", str(model_folder()))
    code += "\nimport moeq\nclass trainer:\n    named_tensors = "
    code += "AutoModelForCausalLM.from_pretrained(path).named_parameters\n"
    assert "57" in python(code + refresh + "\nprint(report.tensors)")


def test_the_example_runs() -> None:
    example = Path(__file__).parent.parent / "examples" / "refresh.py"
    assert python(example.read_text(encoding="utf-8")).count("refreshed 57 tensors") == 3


def test_commands_of_the_command_line_run(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("moeq ")]
    assert len(lines) > 2
    for line in lines:
        line = line.replace("MODEL", str(model_folder())).replace("FOLDER", str(tmp_path / "out"))
        _, *words = shlex.split(line)
        if words == ["demo"]:
            continue  # tests/cli runs it
        result = subprocess.run(
            [sys.executable, "-m", "moeq.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, (line, result.stderr)
        assert result.stdout, line


def test_scheme_table_is_the_schemes() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == {scheme.value for scheme in OnlineQuantScheme}
    for name, rest in rows:
        scheme = OnlineQuantScheme(name)
        weights, _, activations, moe, linear = (cell.strip() for cell in rest.split("|"))
        assert weights.startswith(name.partition("_")[0])
        assert (activations != "as they are") == scheme.quantizes_activations
        assert (moe == "yes", linear == "yes") == (scheme.covers("moe"), scheme.covers("linear"))


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
