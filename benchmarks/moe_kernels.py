"""One MoE layer on one GPU: every scheme of moeq, vLLM's `fused_experts`, bf16 `torch._grouped_mm`.

    python benchmarks/moe_kernels.py [--shapes qwen3 mixtral ...] [--tokens 1 8 ...] [--no-vllm]

Layers run as CUDA graphs that replay over several random routings, so that launches cost what they
cost in a captured model and weights come from memory and not from L2. Ceilings are measured in the
same run: a read of 4 GiB, and 8192^3 products of the libraries. Columns: microseconds (median);
weight bytes of the experts that were hit per second, as a fraction of the read; operations per
second, as a fraction of the product in the same type; time as a fraction of vLLM's for the same
scheme, of vLLM's bf16, of bf16 grouped_mm, and of moeq's own int8 weight-only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeq.experts import ExpertWeights, code_columns, group_shape, scale_shape
from moeq.kernels import triton as ours
from moeq.kernels.triton.library import gather_rows
from moeq.kernels.triton.routing import route
from moeq.kernels.triton.rows import combine_rows
from moeq.schemes import OnlineQuantScheme

SHAPES = {
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "deepseek_v3": (256, 8, 7168, 2048),
    "olmoe": (64, 8, 2048, 1024),
    "gpt_oss_20b": (32, 4, 2880, 2880),
}
"""Experts, top-k, hidden size, intermediate size: Qwen3-30B-A3B, Mixtral-8x7B, one layer of
DeepSeek-V3, OLMoE-7B, gpt-oss-20b (without its biases and clamps)."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_WEIGHT_ONLY = OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY.value

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x, topk_ids, topk_weights -> out."""


def event_us(call: Callable[[], Any], reps: int = 10) -> float:
    """Microseconds of a large operation."""
    for _ in range(3):
        call()
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def graph_us(calls: Sequence[Callable[[], Any]], reps: int = 7) -> float:
    """Microseconds of one call: the median over replays of a graph that holds all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return event_us(graph.replay, reps) / len(calls)


def ceilings() -> dict[str, float]:
    """Bytes per microsecond / 1e6 (TB/s) and operations per microsecond / 1e6 (TF/s)."""
    size = 1 << 32
    data = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    copy = torch.empty_like(data)
    found = {
        "read": size / event_us(lambda: torch.amax(data.view(torch.float32))) / 1e6,
        "copy": 2 * size / event_us(lambda: copy.copy_(data)) / 1e6,
    }
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["bf16"] = 2 * n**3 / event_us(lambda: a @ b) / 1e6
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    product = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    found["fp8"] = 2 * n**3 / event_us(product) / 1e6
    i8 = torch.randint(-127, 128, (n, n), device="cuda", dtype=torch.int8)
    found["int8"] = 2 * n**3 / event_us(lambda: torch._int_mm(i8, i8.t())) / 1e6
    return found


def quantized(scheme: OnlineQuantScheme, e: int, h: int, i: int) -> ExpertWeights:
    """A layer with codes as normal weights have them, made one expert at a time."""

    def codes(*shape: int) -> Tensor:
        if scheme.group is not None:
            size = (*shape[:-1], code_columns(scheme, shape[-1]))
            return torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
        out = torch.empty(shape, dtype=scheme.weight_dtype, device="cuda")
        for matrix in out:
            w = torch.randn(matrix.shape, device="cuda")
            if scheme.weight_dtype == torch.int8:
                matrix.copy_(w.mul_(32).round_().clamp_(-127, 127))
            else:
                matrix.copy_(w.mul_(100).clamp_(-448, 448))
        return out

    def scale(shape: tuple[int, ...], parts: int) -> Tensor:
        grid = scale_shape(scheme.granularity, shape, parts)
        if scheme.group is not None:
            return torch.full(grid, 2.0**-14, device="cuda")
        return (torch.rand(grid, device="cuda") + 0.5) * 6e-4

    def groups(*shape: int) -> Tensor | None:
        grid, dtype = group_shape(scheme, shape), scheme.group_dtype
        if grid is None or dtype is None:
            return None
        low, high = (0x30, 0x48) if dtype == torch.float8_e4m3fn else (126, 129)
        bits = torch.randint(low, high, grid, dtype=torch.uint8, device="cuda")  # 0.5 to 4
        return bits.view(dtype)

    w13, w2 = (e, 2 * i, h), (e, h, i)
    return ExpertWeights(
        scheme, codes(*w13), scale(w13, 2), codes(*w2), scale(w2, 1),
        w13_group=groups(*w13), w2_group=groups(*w2), parts=2,
    )  # fmt: skip


def moeq_call(weights: ExpertWeights) -> Call:
    return lambda x, ids, factors: ours.fused_experts(x, ids, factors, weights, "silu")


def vllm_call(weights: ExpertWeights) -> Call:
    """vLLM's fused kernel over the same codes and scales."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    s13, s2 = weights.w13_scale, weights.w2_scale
    by_row = {"w1_scale": s13[..., None], "w2_scale": s2[..., None]}
    plain = {"w1_scale": s13, "w2_scale": s2}
    match weights.scheme:
        case OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY:
            setup = config.int8_w8a16_moe_quant_config(**plain)
        case OnlineQuantScheme.INT8_PER_CHANNEL:
            setup = config.int8_w8a8_moe_quant_config(
                **by_row, a1_scale=None, a2_scale=None, per_act_token_quant=True
            )
        case OnlineQuantScheme.FP8_PER_TENSOR:
            setup = config.fp8_w8a8_moe_quant_config(**plain)
        case OnlineQuantScheme.FP8_PER_CHANNEL:
            setup = config.fp8_w8a8_moe_quant_config(
                **by_row, per_act_token_quant=True, per_out_ch_quant=True
            )
        case OnlineQuantScheme.FP8_PER_BLOCK:
            setup = config.fp8_w8a8_moe_quant_config(**plain, block_shape=[128, 128])
    w13, w2 = weights.w13, weights.w2
    return lambda x, ids, factors: fused_experts(x, w13, w2, factors, ids, quant_config=setup)


def vllm_bf16_call(w13: Tensor, w2: Tensor) -> Call:
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG as PLAIN
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return lambda x, ids, factors: fused_experts(x, w13, w2, factors, ids, quant_config=PLAIN)


def grouped_mm_call(w13: Tensor, w2: Tensor) -> Call:
    """bf16 as a library does it: sort, gather, `torch._grouped_mm`, activation, again, combine."""
    e, h = w2.shape[:2]

    def call(x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        t, k = ids.shape
        routing = route(ids, e, 128)
        rows = x.new_empty(t * k, h)
        gather_rows[(t * k,)](
            x, rows, routing.pairs, routing.offsets, e, h, TOP_K=k, WIDE=1 << (h - 1).bit_length()
        )
        ends = routing.offsets[1:]
        h13 = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends)
        gate, up = h13.chunk(2, -1)
        mid = torch.nn.functional.silu(gate) * up
        y = torch._grouped_mm(mid, w2.transpose(1, 2), offs=ends)
        out = torch.empty_like(x)
        combine_rows(y, ids, factors, out, e, positions=routing.positions)
        return out

    return call


def routings(t: int, e: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, weights) of several uniform random routings."""
    found = []
    for _ in range(16 if t == 1 else 8 if t <= 128 else 2):
        factors, ids = torch.rand(t, e, device="cuda").topk(k, -1)
        found.append((ids, factors.softmax(-1)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    names = [scheme.value for scheme in OnlineQuantScheme]
    parser.add_argument("--schemes", nargs="*", choices=names, default=names)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after")
    parser.add_argument("--json", help="where to write the rows")
    args = parser.parse_args()
    started = time.perf_counter()
    ceiling = ceilings()
    print(", ".join(f"{name} {value:.2f}" for name, value in ceiling.items()), flush=True)
    print(
        f"{'shape':12}{'tokens':>7} {'what':30}{'us':>10} {'read':>6} {'ops':>6}"
        f" {'/vllm':>6} {'/vllm bf16':>10} {'/grouped':>8} {'/int8':>6}"
    )
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        e, k, h, i = SHAPES[shape]
        inputs = {
            t: (torch.randn(t, h, device="cuda", dtype=torch.bfloat16) * 0.1, routings(t, e, k))
            for t in args.tokens
        }
        times: dict[tuple[str, int], float] = {}

        def measure(
            name: str, call: Call, peers: Sequence[str], kind: str, width: float,
            shape: str = shape, inputs: Any = inputs, times: Any = times,
        ) -> None:  # fmt: skip
            _, k, h, i = SHAPES[shape]
            for t, (x, routed) in inputs.items():
                if time.perf_counter() - started > args.seconds:
                    return
                calls = [lambda r=r, x=x: call(x, r[0], r[1]) for r in routed]
                us = times[name, t] = graph_us(calls)
                hit = statistics.mean(len(ids.unique()) for ids, _ in routed)
                read = hit * 3 * h * i * width / us / 1e6 / ceiling["read"]
                ops = 6 * t * k * h * i / us / 1e6 / ceiling[kind]
                ratios = [us / times[p, t] if (p, t) in times else None for p in peers]
                cells = "".join(
                    f" {'' if ratio is None else f'{ratio:.2f}':>{wide}}"
                    for ratio, wide in zip(ratios, (6, 10, 8, 6))
                )
                print(
                    f"{shape:12}{t:>7} {name:30}{us:>10.1f} {read:>6.0%} {ops:>6.0%}{cells}",
                    flush=True,
                )
                rows.append(
                    {"shape": shape, "tokens": t, "what": name, "us": us, "read": read, "ops": ops}
                )

        if not args.no_bf16:
            w13, w2 = (
                torch.randn(n, device="cuda", dtype=torch.bfloat16) * 0.02
                for n in ((e, 2 * i, h), (e, h, i))
            )
            if not args.no_vllm:
                measure("vllm bf16", vllm_bf16_call(w13, w2), (), "bf16", 2)
            measure("bf16 grouped_mm", grouped_mm_call(w13, w2), ("", "vllm bf16"), "bf16", 2)
            del w13, w2
        for name in args.schemes:
            scheme = OnlineQuantScheme(name)
            weights = quantized(scheme, e, h, i)
            codes = "int8" if scheme.weight_dtype == torch.int8 else "fp8"
            kind = codes if scheme.quantizes_activations else "bf16"
            if not args.no_vllm and scheme.group is None:
                measure(f"vllm {name}", vllm_call(weights), (), kind, 1)
            peers = (f"vllm {name}", "vllm bf16", "bf16 grouped_mm", _WEIGHT_ONLY)
            width = 1 if scheme.group is None else 0.5 + 1 / scheme.group
            measure(name, moeq_call(weights), peers, kind, width)
            del weights
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"ceilings": ceiling, "rows": rows}, file)


if __name__ == "__main__":
    main()
