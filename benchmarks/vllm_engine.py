"""vLLM with moeq's plugin, with its own quantization, and unquantized: loading, memory, speed.

    python benchmarks/vllm_engine.py --python .venv-vllm/bin/python [--gb 2.4] [--device cuda]

Makes a checkpoint of Qwen3-30B-A3B's layers with random weights, and has each engine, in a process
of its own in turn, load it (once to warm up, then --rounds times), read prompts and write tokens.
Seconds and peak memory are those of vLLM's loader; memory is anonymous on a CPU and PyTorch's on a
GPU, above what there was before. On a CPU vLLM runs eager, on a GPU compiled, with CUDA graphs of
the batches that are measured. Medians. The checkpoint is made where --folder has none, and stays.
"""

from __future__ import annotations

import argparse
import gc
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
    "cpu": (
        "bf16", "int8_per_channel_weight_only", "moeq_int8_per_channel, linears bf16",
        "moeq_int8_per_channel_weight_only",
    ),
    "cuda": (
        "bf16", "int8_per_channel_weight_only", "moeq_int8_per_channel_weight_only, linears bf16",
        "moeq_int8_per_channel_weight_only", "fp8_per_channel", "moeq_fp8_per_channel",
    ),
}  # fmt: skip
"""By device; the names without moeq are vLLM's own. Its int8_per_channel_weight_only leaves linears
alone, and quantizes activations on CPUs, whatever its name says, so it goes with
moeq_int8_per_channel there."""

SIZES = {"cpu": (512, 1, (1,)), "cuda": (2048, 8, (1, 32))}
"""By device: tokens of a prompt, prompts at a time, batches of the decode."""

NEW = 64
SHORT = 32
"""Tokens of the prompts of the decode."""

KV_BYTES = 2**30
TRIES = 3

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES // 2**30),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def measure(folder: str, name: str, device: str, rounds: int) -> dict[str, float]:
    """One engine, in vLLM's Python."""
    from vllm.distributed import cleanup_dist_env_and_memory

    loads = watch_loader(device)
    for _ in range(rounds):
        llm = engine(folder, name, device, eager=True)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    llm = engine(folder, name, device, eager=device == "cpu")
    tokens, prompts, batches = SIZES[device]
    found = {
        "load, s": statistics.median(load[0] for load in loads[1:]),
        "peak, MB": statistics.median(load[1] for load in loads[1:]) / 1e6,
        "prompt, tok/s": prompts * tokens / seconds(llm, prompts, tokens, 1),
    }
    for batch in batches:
        first = seconds(llm, batch, SHORT, 1)
        rest = seconds(llm, batch, SHORT, NEW) - first
        found[f"decode of {batch}, tok/s"] = batch * (NEW - 1) / rest
    return found


def watch_loader(device: str) -> list[tuple[float, int]]:
    """Seconds and peak bytes of every load from now on."""
    import torch
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from moeq.memory import PeakMemory

    found: list[tuple[float, int]] = []
    original = BaseModelLoader.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        with PeakMemory(torch.device(device)) as memory:
            model = original(*args, **kwargs)
            if device == "cuda":
                torch.cuda.synchronize()
        found.append((time.perf_counter() - started, memory.peak_bytes or 0))
        return model

    BaseModelLoader.load_model = load_model
    return found


def engine(folder: str, name: str, device: str, *, eager: bool) -> Any:
    from vllm import LLM

    quantization, _, plain_linears = name.partition(",")
    options: dict[str, Any] = {}
    if plain_linears:
        text = json.dumps({"linear": "none"})
        options["hf_overrides"] = {"quantization_config_dict_json": text}
    tokens, prompts, batches = SIZES[device]
    if device == "cuda":
        options["kv_cache_memory_bytes"] = KV_BYTES
        options["gpu_memory_utilization"] = 0.05  # what has to be free at the start
        options["compilation_config"] = {"cudagraph_capture_sizes": list(batches)}
    return LLM(
        folder,
        quantization=None if quantization == "bf16" else quantization,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=eager,
        max_num_seqs=max(prompts, *batches),
        max_num_batched_tokens=max(2048, tokens + NEW),
        max_model_len=tokens + NEW,
        **options,
    )


def seconds(llm: Any, prompts: int, tokens: int, new: int) -> float:
    """Median, after one more to warm up."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
    inputs = [
        {"prompt_token_ids": [(i + 11 * prompt) * 37 % 8000 for i in range(tokens)]}
        for prompt in range(prompts)
    ]
    times = []
    for _ in range(1 + TRIES):
        started = time.perf_counter()
        llm.generate(inputs, sampling, use_tqdm=False)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="that has vLLM and moeq")
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--device", choices=RUNS, default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, name = args.one
        print(json.dumps(measure(folder, name, args.device, args.rounds)))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from loading import make

    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(args.threads)}
    own = ["--device", args.device, "--rounds", str(args.rounds)]
    is_first = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            make(folder, args.gb, args.device)
        for name in RUNS[args.device]:
            command = [args.python, __file__, "--one", str(folder), name, *own]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "Error" in line]
                print(f"{name:38}{lines[-1] if lines else f'exit status {done.returncode}'}")
                continue
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            if is_first:
                print(f"{'':38}" + "".join(f"{column:>24}" for column in found))
                is_first = False
            print(f"{name:38}" + "".join(f"{value:>24.4g}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
