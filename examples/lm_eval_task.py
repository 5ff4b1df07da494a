"""lm-evaluation-harness on a model that moeq loaded: two tasks of our own, bf16 against int8.

    python examples/lm_eval_task.py    # needs lm-eval: pip install ".[lm-eval]"

Any task of the harness runs like this. These two are made on the spot of Python source that the
embedded model never saw, so that nothing is downloaded: `held_out` is the log-likelihood of text,
`next_line` asks which of four lines comes next.
"""

from __future__ import annotations

import random
from typing import Any

import lm_eval
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeq
from moeq.embedded import held_out_text, model_folder

SCHEME = "int8_per_channel_weight_only"


def documents(**_: Any) -> dict[str, Dataset]:
    """Three pieces of held-out source, each within the model's 2,048 tokens."""
    text = held_out_text()
    return {"test": Dataset.from_list([{"text": text[i : i + 3000]} for i in (0, 3000, 6000)])}


def questions(**_: Any) -> dict[str, Dataset]:
    """Six lines of held-out source, the one that follows, and three from elsewhere."""
    chance = random.Random(0)
    lines = [line for line in held_out_text().splitlines() if len(line.strip()) > 8]
    found = []
    for start in chance.sample(range(len(lines) - 6), 32):
        right = lines[start + 6]
        choices = [right, *chance.sample([line for line in lines if line != right], 3)]
        chance.shuffle(choices)
        context = "\n".join(lines[start : start + 6])
        found.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return {"test": Dataset.from_list(found)}


TASKS: list[dict[str, Any]] = [
    {
        "task": "held_out",
        "custom_dataset": documents,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte", "higher_is_better": False}],
    },
    {
        "task": "next_line",
        "custom_dataset": questions,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc", "higher_is_better": True}],
    },
]


def evaluate(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the harness finds of a model: `results` and `samples`, by task."""
    # By default the harness takes and adds log-likelihoods in the model's dtype. In bf16, with its
    # 8 bits, both models then have 1.0041 bits per byte, and documents are off by up to 4 nats
    lm = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    ours_only = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=ours_only, bootstrap_iters=0)


def compare() -> dict[str, Any]:
    """What it finds of the embedded model as it is and quantized while it loads."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {
        "bf16": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        SCHEME: moeq.load(folder, SCHEME),
    }
    return {name: evaluate(model, tokenizer) for name, model in models.items()}


def print_table(found: dict[str, Any]) -> None:
    print(f"{'scheme':30}{'bits per byte':>13}{'right next line':>17}")
    for name, of_model in found.items():
        results = of_model["results"]
        bits, right = results["held_out"]["bits_per_byte,none"], results["next_line"]["acc,none"]
        print(f"{name:30}{bits:13.4f}{right:17.1%}")


if __name__ == "__main__":
    print_table(compare())
