"""What a quantized model can do, what it refuses, and how much memory making it took."""

from __future__ import annotations

import copy
import gc
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from moeq.errors import (
    ModelError,
)
from tests.engines.models import BY_NAME, Architecture
from tests.engines.tools import (
    EXPERTS,
    FP8,
    INT8,
    assert_same_state,
    load,
)

# What runs


def test_no_graph_break(qwen: Path) -> None:
    """One op for a whole layer: what compiles around it sees no Python loop over experts."""
    model = load(qwen, scheme=FP8, dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_a_gate_of_its_own_compiles_too(save: Callable[[Architecture], Path]) -> None:
    model = load(save(BY_NAME["gpt_oss"]), BY_NAME["gpt_oss"], dtype=torch.float32)
    experts = model.get_submodule(BY_NAME["gpt_oss"].experts[0])
    inputs = torch.randn(5, 160), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        expected = experts(*inputs)
        torch._dynamo.reset()
        found = torch.compile(experts, fullgraph=True, backend="eager")(*inputs)
    assert torch.equal(found, expected)


def test_no_gradients(qwen: Path) -> None:
    model = load(qwen)
    assert not any(p.requires_grad for p in model.get_submodule(EXPERTS).parameters())


@pytest.mark.parametrize("scheme", [INT8, FP8])
def test_a_cast_is_refused(scheme: str, qwen: Path) -> None:
    """fp8 codes are floating-point tensors to PyTorch: `.to(dtype)` would rewrite them."""
    model = load(qwen, scheme=scheme)
    with pytest.raises(ModelError, match="dtype of a quantized model"):
        model.get_submodule(EXPERTS).to(torch.float16)
    assert_same_state(model.to("cpu"), load(qwen, scheme=scheme))


def test_a_model_can_be_copied_and_is_freed(qwen: Path) -> None:
    model = load(qwen, scheme=FP8)
    twin = copy.deepcopy(model)
    assert_same_state(twin, model)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    codes = weakref.ref(model.get_submodule(EXPERTS).w13_codes)
    gc.collect()
    gc.disable()
    try:
        del model
        assert codes() is None  # at once, not when the garbage collector comes around
    finally:
        gc.enable()
    assert torch.equal(twin(ids).logits, expected)


# How much memory a load takes

_MEASURE = """
import sys, threading, torch, transformers
from moeq import OnlineQuantizationConfig
from moeq.memory import anonymous_bytes

config = OnlineQuantizationConfig(sys.argv[2])
config.quant_method  # imports and registers the engine
transformers.logging.disable_progress_bar()
kind = transformers.Qwen3MoeForCausalLM
torch.set_num_threads(1)
before, peak, stop = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
model = kind.from_pretrained(sys.argv[1], quantization_config=config)
stop.set()
thread.join()
final = sum(p.nbytes for p in model.parameters())
print(final, max(peak, anonymous_bytes()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
def test_loading_takes_little_more_than_the_final_model(tmp_path: Path) -> None:
    """302 MB of experts in bf16, in both layouts; stock transformers takes 390 MB for the first."""
    processes = []
    for layout in ("per expert", "fused"):
        folder = tmp_path / layout
        write_large_checkpoint(folder, fused=layout == "fused")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _MEASURE, str(folder), INT8],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        final, peak = map(int, stdout.split())
        assert final < 160e6
        assert peak <= final + 64e6


def write_large_checkpoint(folder: Path, *, fused: bool) -> None:
    """A Qwen3-MoE of six layers of 64 experts, whose weights are one block again and again."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.Qwen3MoeForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, parameter in shapes.items():
        tensors = {name: parameter.shape}
        if not fused and name.rpartition(".")[0].endswith("experts"):
            tensors = split_experts(name, parameter.shape)
        for tensor, shape in tensors.items():
            offsets = [end, end := end + 2 * math.prod(shape)]
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
    assert end > 302e6
    block = torch.randn(1 << 20).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def split_experts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the hub has instead of a fused parameter."""
    module, _, parameter = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    num_experts, rows, columns = shape
    return {
        f"{module}.{expert}.{part}.weight": (rows // len(parts), columns)
        for expert in range(num_experts)
        for part in parts
    }
