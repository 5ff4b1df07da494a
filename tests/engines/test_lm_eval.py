"""lm-evaluation-harness: its numbers of a model that moeq loaded are ours."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import auto as hf_auto

import moeq
from moeq.embedded import model_folder

pytest.importorskip("lm_eval", reason="no lm-eval: ./run test-lm-eval makes .venv-lm-eval")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/lm_eval_task.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCHEME = "int8_per_channel_weight_only"

TOLERANCE = 1e-3
"""Of a log-likelihood, in nats. Logits are the same, bit for bit, because the harness too has one
text in a batch; left is the order in which fp32 numbers are added, and at 3,000 they are 2.4e-4
apart. Quantization changes half of the log-likelihoods by 0.06 and more."""


@pytest.fixture(autouse=True, scope="module")
def connections() -> Iterator[list[Any]]:
    """Whom this process tried to reach: refused, and noted because the harness may swallow that."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError(f"a test wants {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield tried


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def found(example: dict[str, Any]) -> dict[str, Any]:
    return example["compare"]()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    bf16 = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    return {"bf16": bf16, SCHEME: moeq.load(model_folder(), SCHEME)}


@pytest.fixture(scope="module")
def saved(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "int8"
    moeq.save(models[SCHEME], folder)
    return folder


def log_likelihood(model: Any, context: list[int], ids: list[int]) -> float:
    """Of `ids` after `context`, both token ids, in nats."""
    with torch.inference_mode():
        logits = model(torch.tensor([(context + ids)[:-1]])).logits[0].float()
    of_ids = torch.tensor(ids)[:, None]
    return logits.log_softmax(-1)[-len(ids) :].gather(1, of_ids).sum().item()


def ours(model: Any, example: dict[str, Any]) -> list[float]:
    """By hand, what `theirs` takes from the harness's samples."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    numbers = []
    for document in example["documents"]()["test"]:
        start = [tokenizer.bos_token_id]  # so that the first token is judged too
        numbers.append(log_likelihood(model, start, tokenizer.encode(document["text"])))
    for question in example["questions"]()["test"]:
        context = tokenizer.encode(question["context"])
        for line in question["choices"]:
            ids = tokenizer.encode(f"{question['context']}\n{line}")
            assert ids[: len(context)] == context
            numbers.append(log_likelihood(model, context, ids[len(context) :]))
    return numbers


def theirs(found: dict[str, Any]) -> list[float]:
    samples = found["samples"]
    documents = [number for sample in samples["held_out"] for number in sample["filtered_resps"]]
    return documents + [
        number for sample in samples["next_line"] for number, _greedy in sample["filtered_resps"]
    ]


def test_log_likelihoods_are_those_by_hand(
    example: dict[str, Any], found: dict[str, Any], models: dict[str, Any]
) -> None:
    by_hand = {name: torch.tensor(ours(model, example)) for name, model in models.items()}
    harness = {name: torch.tensor(theirs(found[name])) for name in models}
    assert len(harness["bf16"]) == 3 + 32 * 4
    for name in models:
        torch.testing.assert_close(harness[name], by_hand[name], rtol=0, atol=TOLERANCE)
    # Each is the model that it is said to be
    apart = (harness[SCHEME] - harness["bf16"]).abs()
    assert apart.median() > 10 * TOLERANCE
    assert apart[:3].min() > 100 * TOLERANCE


def test_the_example_prints_a_table(
    example: dict[str, Any], found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    example["print_table"](found)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\w+) +(\d\.\d{4}) +(\d+\.\d)%$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["bf16", SCHEME]
    for _, bits, right in rows:
        assert float(bits) < 1.5, "it has learned Python"
        assert float(right) > 35, "better than one in four"


def test_nothing_is_downloaded(found: dict[str, Any], connections: list[Any]) -> None:
    assert found
    assert not connections


def test_readme_code_runs(
    example: dict[str, Any], models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(import lm_eval\n.*?)```", README, re.DOTALL)
    names = example | {
        "model": models[SCHEME],
        "tokenizer": AutoTokenizer.from_pretrained(model_folder()),
        "own": example["TaskManager"](include_defaults=False),
    }
    assert '["hellaswag"]' in code
    exec(code.replace('["hellaswag"]', "TASKS, limit=1, task_manager=own"), names)
    assert "|next_line|" in capsys.readouterr().out


def test_readme_command_gives_the_same_numbers(
    saved: Path, found: dict[str, Any], example: dict[str, Any], tmp_path: Path
) -> None:
    (command,) = re.findall(r"```sh\n(python -c [^`]*?--model hf.*?)```", README, re.DOTALL)
    shutil.copy(EXAMPLE, tmp_path)
    task = dict(example["TASKS"][0])
    assert task.pop("custom_dataset").__name__ == "documents"
    lines = f"custom_dataset: !function {EXAMPLE.stem}.documents\n" + yaml.safe_dump(task)
    (tmp_path / "held_out.yaml").write_text(lines)

    results = tmp_path / "results"
    filled_in = {
        "\\\n": " ",  # shlex does not know it
        "FOLDER": str(saved),
        "hellaswag": f"{tmp_path / 'held_out.yaml'} --output_path {results}",
    }
    for word, instead in filled_in.items():
        assert word in command
        command = command.replace(word, instead)
    python, *rest = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *rest],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = results.rglob("results_*.json")
    theirs = json.loads(result.read_text())["results"]["held_out"]["bits_per_byte,none"]
    assert theirs == found[SCHEME]["results"]["held_out"]["bits_per_byte,none"]


# The harness hands the config that it found in the folder over once more
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_the_harness_needs_to_be_told(
    saved: Path, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = example["HFLM"]
    moeq.register()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        harness(str(saved), device="cpu")
    # Its class hands over a quantization config of its own making, None here, beside that of ours
    config = moeq.OnlineQuantizationConfig(SCHEME)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'quantization_con"):
        harness(str(model_folder()), device="cpu", quantization_config=config)
    monkeypatch.delitem(hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "moeq")
    with pytest.raises(ValueError, match="Unknown quantization type, got moeq"):
        harness(str(saved), device="cpu", variant="moeq")
