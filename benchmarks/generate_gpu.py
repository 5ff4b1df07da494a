"""Milliseconds per token of a whole model on one GPU, batch 1: transformers' bf16 against moeq.

    python benchmarks/generate_gpu.py [--layers 16] [--quantization NAME]

A Qwen3-MoE model with Qwen3-30B-A3B's dimensions and random weights is made, timed as it is,
saved, and loaded quantized. Both run `generate` with a static cache, which transformers compiles
(fullgraph, so a graph break is an error) and replays as a CUDA graph. The time of a token is that
of 256 tokens less that of one, by 255.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from transformers import CompileConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeq


def tiny_prompt(device: str = "cuda") -> torch.Tensor:
    return torch.arange(100, 164, device=device)[None]


def seconds(model: Any, tokens: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(
        tiny_prompt(),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        max_length=None,
        compile_config=CompileConfig(fullgraph=True),
    )
    torch.cuda.synchronize()
    return time.perf_counter() - started


def milliseconds_per_token(model: Any) -> tuple[float, float]:
    """(compiled, seconds that compiling took)."""
    first = seconds(model, 256)
    times = sorted(seconds(model, 256) for _ in range(4))
    prefill = sorted(seconds(model, 1) for _ in range(4))[1]
    return (times[1] - prefill) / 255 * 1e3, first - times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--quantization", nargs="*", default=["int8_per_channel_weight_only"])
    parser.add_argument("--skip-bf16", action="store_true")
    parser.add_argument("--json", help="where to write the results")
    args = parser.parse_args()
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=6144,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = Qwen3MoeForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        print(f"made in {time.perf_counter() - started:.1f} s", flush=True)
        started = time.perf_counter()
        model.save_pretrained(folder)
        print(f"saved in {time.perf_counter() - started:.1f} s", flush=True)
        if not args.skip_bf16:
            results["bf16"], compiling = milliseconds_per_token(model)
            print(
                f"bf16: {results['bf16']:.3f} ms per token, {compiling:.0f} s to compile",
                flush=True,
            )
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        for name in args.quantization:
            started = time.perf_counter()
            model = moeq.load(folder, name, device="cuda", dtype=torch.bfloat16)
            print(f"{name}: loaded in {time.perf_counter() - started:.1f} s", flush=True)
            print("\n".join(moeq.report_of(model).lines()), flush=True)
            results[name], compiling = milliseconds_per_token(model)
            print(
                f"{name}: {results[name]:.3f} ms per token, {compiling:.0f} s to compile",
                flush=True,
            )
            if "bf16" in results:
                print(f"{name}: {results[name] / results['bf16']:.3f} of bf16's time", flush=True)
            del model
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
