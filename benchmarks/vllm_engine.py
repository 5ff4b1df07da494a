"""vLLM with moeq's plugin, with its own int8, and unquantized: loading, memory, speed.

    python benchmarks/vllm_engine.py --python .venv-vllm/bin/python [--gb 2.4] [--threads 2]

Makes a checkpoint of Qwen3-30B-A3B's layers with random weights, and has each engine, in a process
of its own in turn, load it, read prompts of 512 tokens and write 64 tokens. Anonymous memory is
above what the process has before it loads, without vLLM's KV cache. Medians over --rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = {
    "bf16": None,
    "vLLM int8_per_channel_weight_only": "int8_per_channel_weight_only",
    "moeq_int8_per_channel, linears bf16": "moeq_int8_per_channel",
    "moeq_int8_per_channel_weight_only": "moeq_int8_per_channel_weight_only",
}
"""vLLM's int8 quantizes activations on CPUs, whatever its name says, so it goes with the third."""

PROMPT, NEW = 512, 64
KV_GIB = 1


def measure(folder: str, quantization: str | None) -> dict[str, float]:
    """One run, in vLLM's Python."""
    from vllm import LLM, SamplingParams

    from moeq.memory import PeakMemory

    options: dict[str, Any] = {"max_model_len": PROMPT + NEW, "enforce_eager": True}
    if quantization == "moeq_int8_per_channel":
        text = json.dumps({"linear": "none"})
        options["hf_overrides"] = {"quantization_config_dict_json": text}
    import torch

    with PeakMemory(torch.device("cpu")) as memory:
        started = time.perf_counter()
        llm = LLM(
            folder,
            quantization=quantization,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=1,
            **options,
        )
        load = time.perf_counter() - started

    def seconds(new: int) -> float:
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
        prompt: Any = {"prompt_token_ids": [i * 37 % 8000 for i in range(PROMPT)]}
        times = []
        for _ in range(3):
            started = time.perf_counter()
            llm.generate(prompt, sampling, use_tqdm=False)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    seconds(2)
    prefill = seconds(1)
    return {
        "load": load,
        "peak": (memory.peak_bytes or 0) - KV_GIB * 2**30,
        "prefill": PROMPT / prefill,
        "decode": (NEW - 1) / (seconds(NEW) - prefill),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="that has vLLM and moeq")
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, quantization = args.one
        print(json.dumps(measure(folder, quantization or None)))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from loading import make

    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
    }
    found: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.gb, "cpu")
        for _ in range(args.rounds):
            for name, quantization in RUNS.items():
                if name in failed:
                    continue
                command = [args.python, __file__, "--one", folder, quantization or ""]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if "Error" in line]
                    failed[name] = lines[-1] if lines else f"exit status {done.returncode}"
                else:
                    found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':38}{'load s':>8} {'peak MB':>8} {'prompt tok/s':>13} {'decode tok/s':>13}")
    for name in RUNS:
        if name in failed:
            print(f"{name:38}{failed[name]}")
            continue
        load, peak, prefill, decode = (
            statistics.median(run[key] for run in found[name])
            for key in ("load", "peak", "prefill", "decode")
        )
        print(f"{name:38}{load:>8.2f} {peak / 1e6:>8.0f} {prefill:>13.1f} {decode:>13.2f}")


if __name__ == "__main__":
    main()
