"""Loading: seconds, memory, against reading the same files and against transformers' own bf16.

    python benchmarks/loading.py [--gb 2.4] [--device cuda] [--quantization NAME ...] [--cold]

Makes a checkpoint of Qwen3-30B-A3B's layers with random weights (kept with --keep, found again with
--folder), then, each in a process of its own: reads the files into (page-locked) memory by several
threads and nothing else; loads with moeq under each scheme; with transformers in bf16. Medians over
--rounds. Peak memory is anonymous memory on the host, and PyTorch's on a GPU.
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

import torch

LAYER_GB = 1.2
"""Of one layer: 128 experts of 3 x 2048 x 768 in bf16."""


def make(folder: Path, gb: float, device: str, experts: int = 128) -> None:
    """A Qwen3-MoE checkpoint of about `gb` 10^9 bytes, one layer in memory at a time."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers = max(1, round(gb / LAYER_GB))
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=768, intermediate_size=6144, norm_topk_prob=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.dtype = torch.bfloat16
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    weight_map: dict[str, str] = {}
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        group = groups.setdefault(layer, {})
        if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name:
            base, kind = name.rsplit(".", 1)
            for expert in range(parameter.shape[0]):
                n, k = parameter.shape[1:]
                parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                for part in parts:
                    shape = torch.Size((n // len(parts), k))
                    group[f"{base}.{expert}.{part}.weight"] = shape
        else:
            group[name] = parameter.shape
    for index, group in enumerate(groups.values()):
        file = f"model-{index:05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files' contents."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path, device: torch.device) -> float:
    """Seconds of reading the tensors and doing nothing with them: by the threads of a load, into
    its buffers, which are page-locked before the clock starts if they are."""
    from moeq.checkpoint.folder import checkpoint_files
    from moeq.checkpoint.headers import read_headers
    from moeq.checkpoint.ring import Ring, feed
    from moeq.checkpoint.stream import chunks_of, stream, whole

    specs = read_headers(checkpoint_files(folder))
    workers = min(16, os.cpu_count() or 1)
    pieces = [whole(spec, None) for spec in specs.values()]
    if device.type != "cuda":
        chunks = chunks_of(pieces)
        started = time.perf_counter()
        stream(chunks, lambda chunk, buffer: None, workers=workers)
        return time.perf_counter() - started
    chunks = chunks_of(pieces, 32 << 20)
    ring = Ring(8, max(chunk.nbytes for chunk in chunks))
    while ring.free.qsize() < 8:
        time.sleep(0.01)
    event = torch.cuda.current_stream().record_event()
    started = time.perf_counter()
    feed(ring, chunks, lambda chunk, buffer: event, readers=workers)
    return time.perf_counter() - started


def measure(what: str, folder: Path, device: str, cold: bool) -> dict[str, Any]:
    """One run, in this process: seconds and peak bytes."""
    from transformers import AutoModelForCausalLM

    from moeq import load, report_of
    from moeq.memory import PeakMemory

    where = torch.device(device)
    if cold:
        drop_cache(folder)
    if what == "read":
        return {"seconds": read(folder, where), "peak": None}
    started = time.perf_counter()
    if what == "bf16":
        with PeakMemory(where) as memory:
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
        return {"seconds": time.perf_counter() - started, "peak": memory.peak_bytes}
    model = load(folder, what, device=device)
    if where.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    report = report_of(model)
    return {
        "seconds": seconds,
        "peak": report.peak_bytes_actual,
        "planned": report.peak_bytes_planned,
        "final": report.total_bytes_after,
    }


def measure_all(
    what: str, folder: Path, small: Path, device: str, cold: bool, rounds: int
) -> list[dict[str, Any]]:
    """Runs in this process, after one of a small model: imports, the compilation of kernels and
    the first use of a GPU are not part of loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    measure(what, small, device, False)
    return [measure(what, folder, device, cold) for _ in range(rounds)]


def measure_refresh(folder: Path, what: str, device: str) -> None:
    """Milliseconds of a refresh of all the model's weights, which are where the model is."""
    from safetensors.torch import load_file

    from moeq import load, refresh

    model = load(folder, what, device=device)
    tensors: list[tuple[str, torch.Tensor]] = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors += load_file(file, device=device).items()
    layers = model.config.num_hidden_layers
    times = []
    for _ in range(9):
        started = time.perf_counter()
        refresh(model, iter(tensors))
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    print(
        f"refresh {what}: first {times[0]:.1f} ms, then {statistics.median(times[1:]):.2f} ms,"
        f" {statistics.median(times[1:]) / layers:.2f} a layer ({layers} layers and embeddings,"
        f" {len(tensors)} tensors)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.4)
    parser.add_argument("--folder", type=Path, help="a checkpoint made before")
    parser.add_argument("--keep", type=Path, help="where to make one that stays")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run")
    parser.add_argument(
        "--quantization", nargs="*", default=["int8_per_channel_weight_only", "fp8_per_block"]
    )
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--refresh", action="store_true", help="refreshes, and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        found = measure_all(args.one, args.folder, args.small, args.device, args.cold, args.rounds)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or args.keep or Path(made) / "checkpoint"
        small = Path(made) / "small"
        small.mkdir()
        make(small, LAYER_GB, args.device, experts=8)
        if args.folder is None:
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, args.gb, args.device)
        if args.refresh:
            for name in args.quantization:
                measure_refresh(folder, name, args.device)
            return
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        names = ["read", *args.quantization, *([] if args.no_bf16 else ["bf16"])]
        runs: dict[str, list[dict[str, Any]]] = {}
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--small", str(small)]
            command += ["--folder", str(folder), "--device", args.device]
            command += ["--rounds", str(args.rounds), *(["--cold"] if args.cold else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            runs[name] = json.loads(done.stdout.splitlines()[-1])
        reading = statistics.median(run["seconds"] for run in runs["read"])
        print(f"{nbytes / 1e9:.1f} GB, {'cold' if args.cold else 'warm'}, {args.device}")
        print(
            f"{'':32}{'s':>7} {'/read':>6} {'GB/s':>6} {'peak MB':>8} {'planned':>8} {'final':>8}"
        )
        for name, found in runs.items():
            seconds = statistics.median(run["seconds"] for run in found)
            cells = [
                "" if found[0].get(key) is None else f"{max(run[key] for run in found) / 1e6:.0f}"
                for key in ("peak", "planned", "final")
            ]
            print(
                f"{name:32}{seconds:>7.2f} {seconds / reading:>6.2f} {nbytes / 1e9 / seconds:>6.2f}"
                + "".join(f" {cell:>8}" for cell in cells)
            )


if __name__ == "__main__":
    main()
