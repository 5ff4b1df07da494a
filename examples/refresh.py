"""A loop as in reinforcement learning: generate, train, refresh the quantized model in place.

    python examples/refresh.py

The model that trains is bf16 and the one that generates is int8, both from the same checkpoint;
here the embedded one, and noise stands for an optimizer. Every round the new weights go into the
quantized model where it stands, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeq
from moeq.embedded import model_folder

folder = model_folder()
tokenizer = AutoTokenizer.from_pretrained(folder)
trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
generating = moeq.load(folder, "int8_per_channel_weight_only")
prompt = tokenizer("def read_lines(path):", return_tensors="pt")


def named_tensors() -> Iterator[tuple[str, Tensor]]:
    """The trained weights under their names in the model; tied ones once."""
    yield from trained.named_parameters()


for step in range(3):
    output = generating.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(f"step {step}: {tokenizer.decode(output[0])!r}")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    report = moeq.refresh(generating, named_tensors())
    print(f"refreshed {report.tensors} tensors, {report.nbytes / 1e6:.0f} MB,"
          f" in {report.seconds * 1e3:.0f} ms")  # fmt: skip
