"""Times candidate tilings of the Triton kernels on this GPU, checks their results, keeps the best.

    python benchmarks/tune.py --out results.json [--families ...] [--tokens ...]
    python benchmarks/tune.py --gemv --out results.json
    python benchmarks/tune.py --ship results.json ...    # writes moeq's tilings.json

Each product (up with its activation, down) is timed alone, with routing done, over rotated routings
in a CUDA graph. Every candidate is compared with a product of dequantized weights in fp32; one that
is wrong is reported and never kept. Compiling is spread over processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_kernels import SHAPES, graph_us, quantized
from moeq import four_bits
from moeq.experts import ExpertWeights
from moeq.kernels.triton import layer, plans
from moeq.kernels.triton.layer import Gemm, Gemv
from moeq.kernels.triton.routing import route
from moeq.schemes import Granularity, OnlineQuantScheme

RANGES = (1.6, 4.5, 16, 48, 256, 1024, 1e9)
"""Upper ends, in rows per active expert."""

NAMES = {
    "decode": "decode",
    "int4": "decode_groups",
    "mxfp4": "decode_groups",
    "fp8": "fp8",
    "int8": "int8",
    "block": "fp8_block",
}
"""Families as moeq's table calls them."""

WRONG = 0.01
"""Relative error of a product above which a candidate is broken; rounding gives 0.002."""

ON = layer.Arithmetic(codes=True, fp8_bits=False, pdl=True, ptx=True)


def gemms(
    rows: list[tuple[int, ...]],
    groups=(1,),
    swaps=(False,),
    promotes=(False,),
    tails=(0,),
    **fixed: Any,
) -> list[Gemm]:
    """rows: block_n, block_k, warps, stages and, optionally, registers."""
    return [
        Gemm(*r[:4], group_m=g, swap=s, promote=p, registers=r[4] if len(r) > 4 else None,
             tail_m=tail, **fixed)
        for r, g, s, p, tail in itertools.product(rows, groups, swaps, promotes, tails)
    ]  # fmt: skip


def candidates(family: str) -> dict[int, list[Gemm]]:
    """Tilings to try, by rows of a tile: what came near the best in wider searches."""
    if family == "decode":
        low = [(64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (64, 256, 4, 3), (64, 256, 4, 4)]
        low += [(32, 256, 4, 4), (128, 256, 4, 3), (64, 256, 8, 3), (64, 128, 2, 4)]
        middle = [(128, 64, 4, 4), (128, 128, 4, 3), (64, 256, 4, 3), (128, 128, 8, 3)]
        return {
            16: gemms(low),
            32: gemms([(128, 128, 4, 3), (128, 128, 8, 3), (64, 256, 4, 3)]),
            64: gemms(middle, groups=(16,), tails=(0, 32)),
            128: gemms([(128, 64, 4, 3), (128, 64, 4, 4)], groups=(16, 32), tails=(0, 32, 64)),
        }
    if family in ("int4", "mxfp4"):
        low = [(64, 256, 4, 3), (64, 256, 4, 4), (128, 128, 4, 4), (128, 256, 4, 3)]
        few_warps = [(64, 256, 2, 3), (64, 256, 2, 4), (64, 512, 2, 3), (128, 256, 2, 3)]
        few_warps += [(32, 256, 1, 4), (32, 512, 1, 4), (64, 512, 2, 4), (128, 256, 2, 4)]
        few_warps += [(64, 1024, 2, 2), (32, 512, 2, 4), (128, 512, 2, 2)]
        return {
            8: gemms(few_warps, swaps=(True,)),
            16: gemms(few_warps, swaps=(True,)) + gemms(low),
            32: gemms(few_warps, swaps=(True,)) + gemms(low),
            64: gemms([(128, 64, 4, 4), (128, 128, 4, 3)], groups=(16,), tails=(0, 32)),
            128: gemms([(128, 64, 4, 3), (128, 64, 4, 4)], groups=(16,), tails=(0, 32)),
        }
    if family == "block":
        low = [(64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (128, 128, 8, 4)]
        middle = [(128, 128, 4, 3), (128, 128, 4, 4)]
        halved = [(256, 128, 8, 3), (256, 128, 8, 4)]
        return {
            16: gemms(low, swaps=(False, True)),
            32: gemms([(64, 128, 4, 4), *middle], swaps=(False, True)),
            64: gemms(middle, groups=(16,), tails=(0, 32))
            + gemms([(128, 128, 4, 3, 168), (256, 128, 4, 2)], groups=(16,), halves=True),
            128: gemms([(128, 128, 8, 3)], groups=(16,), tails=(64,))
            + gemms(halved, groups=(8, 16, 32), tails=(0, 32, 64), halves=True),
        }
    swaps, promotes = (False, True), (family == "fp8",)
    low = [(64, 128, 4, 4), (64, 256, 4, 3), (64, 256, 4, 4), (128, 128, 4, 3), (128, 256, 4, 3)]
    between = [(64, 128, 4, 4), (128, 128, 4, 3), (128, 128, 4, 4), (64, 256, 4, 3)]
    middle = [(128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 8, 3), (256, 128, 8, 3)]
    middle += [(256, 128, 4, 3), (64, 256, 4, 3)]
    high = [(128, 128, 4, 3), (256, 128, 8, 3), (256, 128, 8, 4), (256, 256, 8, 2)]
    return {
        16: gemms(low, swaps=swaps, promotes=promotes),
        32: gemms(between, swaps=swaps, promotes=promotes),
        64: gemms(middle, groups=(4, 16), promotes=promotes, tails=(0, 32)),
        128: gemms(high, groups=(16, 32), tails=(0, 64)),
    }


FAMILIES = {
    "decode": OnlineQuantScheme.INT8_PER_CHANNEL_WEIGHT_ONLY,
    "int4": OnlineQuantScheme.INT4_PER_GROUP_WEIGHT_ONLY,
    "mxfp4": OnlineQuantScheme.MXFP4_WEIGHT_ONLY,
    "fp8": OnlineQuantScheme.FP8_PER_CHANNEL,
    "int8": OnlineQuantScheme.INT8_PER_CHANNEL,
    "block": OnlineQuantScheme.FP8_PER_BLOCK,
}


def routings(t: int, e: int, k: int, n: int) -> list[torch.Tensor]:
    return [torch.rand(t, e, device="cuda").topk(k, -1).indices for _ in range(n)]


def compile_one(job: tuple[str, int, Gemm]) -> str:
    family, block_m, config = job
    torch.cuda.set_device(0)
    weights = quantized(FAMILIES[family], 2, 512, 512)
    try:  # a candidate that does not fit is only reported
        for tokens in (16, 1024):
            run_both(weights, block_m, config, tokens)
    except Exception as error:  # noqa: BLE001
        return f"{job}: {str(error)[:120]}"
    return ""


def compile_all(compile_one: Callable[[Any], str], jobs: list[Any]) -> None:
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        for line in pool.imap_unordered(compile_one, jobs):
            if line:
                print("does not run:", line, flush=True)
    print(f"{len(jobs)} candidates compiled in {time.perf_counter() - started:.0f} s", flush=True)


def run_both(weights: ExpertWeights, block_m: int, config: Gemm, t: int) -> None:
    ids = routings(t, weights.num_experts, 2, 1)[0]
    routing = route(ids, weights.num_experts, block_m)
    for call in products(weights, ids, routing, block_m, t, 2):
        call(config)
    torch.cuda.synchronize()


def products(weights, ids, routing, block_m, t, k):
    """(up, down): functions of a config, which write into buffers of their own."""
    w13, w2 = layer.projections(weights)
    x = torch.randn(t, w13.k, dtype=torch.bfloat16, device="cuda")
    h = torch.randn(t * k, w2.k, dtype=torch.bfloat16, device="cuda")
    mid = torch.empty_like(h)
    y = x.new_empty(t * k, w13.k, dtype=torch.float32 if t * k <= 1024 else None)  # as in layers
    a, a_scale = layer.quantized(x, w13, ON, pdl=False)
    b, b_scale = layer.quantized(h, w2, ON, pdl=False)

    def up(config: Gemm) -> torch.Tensor:
        layer.run_gemm(a, a_scale, routing, w13, mid, "silu", k, block_m, config, ON,
                       x_rows="token", out_rows="sorted")  # fmt: skip
        return mid

    def down(config: Gemm) -> torch.Tensor:
        layer.run_gemm(b, b_scale, routing, w2, y, "", k, block_m, config, ON,
                       x_rows="sorted", out_rows="pair")  # fmt: skip
        return y

    up.inputs, down.inputs = (a, a_scale, w13), (b, b_scale, w2)  # type: ignore[attr-defined]
    return up, down


def error_of(call, config: Gemm, routing, k: int, is_up: bool) -> float:
    """Relative error over the rows of two experts."""
    rows, scale, w = call.inputs
    out = call(config)
    out.fill_(float("nan"))
    call(config)
    offsets = routing.offsets.tolist()
    counts = [b - a for a, b in itertools.pairwise(offsets)]
    worst = 0.0
    for e in sorted(range(len(counts)), key=lambda e: -counts[e])[:2]:
        pairs = routing.pairs[offsets[e] : offsets[e + 1]].long()
        source = pairs // k if is_up else torch.arange(offsets[e], offsets[e + 1], device="cuda")
        a = rows[source].float()
        weight = w.codes[e].float() if w.group is None else four_bits.decode(w.codes[e], w.group[e])
        if w.scheme.granularity is Granularity.BLOCK:
            a *= scale[source].repeat_interleave(128, 1)[:, : a.shape[1]]
            grids = w.scale[e].view(w.parts, -1, w.scale.shape[-1])
            grid = grids.repeat_interleave(128, 1)[:, : w.n].reshape(-1, grids.shape[-1])
            weight *= grid.repeat_interleave(128, 1)[:, : w.k]
        else:
            weight *= w.scale[e][:, None]
            if scale is not None:
                a *= scale[source]
        want = a @ weight.T
        if is_up:
            gate, up = want.chunk(2, -1)
            want = torch.nn.functional.silu(gate) * up
        got = out[offsets[e] : offsets[e + 1]] if is_up else out[pairs]
        worst = max(worst, ((got.float() - want).norm() / want.norm()).item())
        if worst != worst:
            return float("inf")
    return worst


def gemv_candidates(family: str, top_k: int) -> list[tuple[bool, Gemv]]:
    """(of up or of down, tiling) of the kernels for one token: what gives a thread some codes."""
    grouped = FAMILIES[family].group is not None
    columns = (128, 256, 512, 1024, 2048) if grouped else (128, 256, 512, 1024)
    least, most = (64, 512) if grouped else (16, 64)
    return [
        (is_up, Gemv(rows, block_k, warps))
        for is_up, rows, block_k, warps in itertools.product(
            (True, False), (1, 2, 4, 8, 16), columns, (1, 2, 4)
        )
        if least <= (2 if is_up else top_k) * rows * block_k / (32 * warps) <= most
    ]


def compile_gemv(job: tuple[str, int, int, bool, Gemv]) -> str:
    family, e, k, is_up, config = job
    torch.cuda.set_device(0)
    w13, w2 = layer.projections(quantized(FAMILIES[family], e, 512, 512))
    try:
        gemv_calls(w13, w2, k)[not is_up](routings(1, e, k, 1)[0], config)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001
        return f"{job}: {str(error)[:120]}"
    return ""


def gemv_calls(w13: layer.Projection, w2: layer.Projection, k: int):
    """(up, down): functions of ids and a tiling."""
    x = torch.randn(1, w13.k, dtype=torch.bfloat16, device="cuda")
    mid = torch.randn(k, w2.k, dtype=torch.bfloat16, device="cuda")
    factors = torch.rand(1, k, device="cuda")
    a, b = (layer.quantized(v, w, ON, pdl=False) for v, w in ((x, w13), (mid, w2)))

    def up(ids: torch.Tensor, config: Gemv) -> None:
        layer.gemv_up(*a, ids, w13, torch.empty_like(mid), "silu", config, ON, pdl=True)

    def down(ids: torch.Tensor, config: Gemv) -> None:
        layer.gemv_down(*b, ids, factors, w2, torch.empty_like(x), config, ON)

    return up, down


def search_gemv(families: list[str], shapes: list[str], seconds: float) -> list[dict[str, Any]]:
    """Time the kernels for one token: rows and columns of a program, and its warps."""
    started = time.perf_counter()
    jobs = [
        (family, 16 if SHAPES[name][0] % 16 == 0 else 8, SHAPES[name][1], *candidate)
        for name, family in itertools.product(shapes, families)
        for candidate in gemv_candidates(family, SHAPES[name][1])
    ]
    compile_all(compile_gemv, jobs)
    results = []
    for name, family in itertools.product(shapes, families):
        e, k, h, i = SHAPES[name]
        w13, w2 = layer.projections(quantized(FAMILIES[family], e, h, i))
        routed = routings(1, e, k, 16)
        calls = gemv_calls(w13, w2, k)
        for is_up, config in gemv_candidates(family, k):
            if time.perf_counter() - started > seconds:
                break
            call = calls[not is_up]
            us = graph_us([functools.partial(call, ids, config) for ids in routed])
            row = {"gemv": True, "shape": name, "family": family, "up": is_up, "us": us}
            results.append({**row, "top_k": k, "tiling": list(dataclasses.astuple(config))})
        for is_up in (True, False):
            mine = [
                r for r in results if (r["shape"], r["family"], r["up"]) == (name, family, is_up)
            ]
            best = sorted(mine, key=lambda row: row["us"])[:6]
            shown = " | ".join(f"{row['us']:.1f} us {row['tiling']}" for row in best)
            print(f"{name} {family} {'up' if is_up else 'down'}: {shown}", flush=True)
    return results


def ship_gemv(rows: list[dict[str, Any]], tables: dict[str, Any]) -> None:
    """One tiling for up; for down one by the number of slots that were measured."""
    for name in {NAMES[row["family"]] for row in rows}:
        mine = [row for row in rows if NAMES[row["family"]] == name]
        table = tables[name]["gemv"]

        def best(rows: list[dict[str, Any]]) -> list[int]:
            times: dict[tuple[int, ...], list[float]] = {}
            for row in rows:
                times.setdefault(tuple(row["tiling"]), []).append(math.log(row["us"]))
            most = max(len(found) for found in times.values())
            complete = {tiling: sum(t) for tiling, t in times.items() if len(t) == most}
            return list(min(complete, key=complete.__getitem__))

        table["up"] = best([row for row in mine if row["up"]])
        for top_k in {row["top_k"] for row in mine}:
            tiling = best([row for row in mine if not row["up"] and row["top_k"] == top_k])
            kept = [entry for entry in table["down"] if entry["top_k"] != top_k]
            entry = {"top_k": top_k, "tiling": tiling}
            table["down"] = sorted([*kept, entry], key=lambda entry: entry["top_k"])


def rows_per_expert(shape: str, tokens: int) -> float:
    """See `moeq.kernels.triton.plans`."""
    e, k, _, _ = SHAPES[shape]
    pairs = tokens * k
    return pairs / (e * (1 - (1 - 1 / e) ** pairs))


def ship(files: list[str]) -> None:
    """Put the best tiling of every family and range of rows into the table that moeq reads.

    In a range the height of a tile is what makes both products fastest together, in the geometric
    mean over its cases (shape, tokens); then each product's tiling likewise. Ranges without a
    complete measurement keep what they have.
    """
    path = Path(layer.__file__).with_name("tilings.json")
    tables = json.loads(path.read_text())
    fields = [field.name for field in dataclasses.fields(Gemm)]
    times: dict[tuple[str, float], Any] = {}
    for file in files:
        rows = json.loads(Path(file).read_text())
        ship_gemv([row for row in rows if "gemv" in row], tables)
        for row in rows:
            if "gemv" in row or row["error"] > WRONG:
                continue
            case = (row["shape"], row["tokens"], row["family"])
            limit = next(r for r in RANGES if rows_per_expert(*case[:2]) <= r)
            config = Gemm(**{name: row[name] for name in fields})
            found = times.setdefault((NAMES[row["family"]], limit), {})
            by_case = found.setdefault((row["block_m"], row["up"]), {}).setdefault(config, {})
            by_case[case] = min(row["us"], by_case.get(case, math.inf))
    for (family, limit), found in sorted(times.items()):
        cases = {case for configs in found.values() for us in configs.values() for case in us}
        deep = {case for case in cases if SHAPES[case[0]][3] > plans.DEEP}
        parts = {"up": cases, "down": cases - deep, "deep": deep}
        choices = []
        for block_m in sorted({block_m for block_m, _ in found}):
            best = {
                name: min(
                    (
                        (sum(math.log(us[case]) for case in mine), index, config)
                        for index, (config, us) in enumerate(
                            found.get((block_m, name == "up"), {}).items()
                        )
                        if mine <= us.keys()
                    ),
                    default=None,
                )
                for name, mine in parts.items()
                if mine
            }
            if "down" in best and all(best.values()):
                both = sum(
                    math.log(
                        found[block_m, True][best["up"][2]][case]
                        + found[block_m, False][best["deep" if case in deep else "down"][2]][case]
                    )
                    for case in cases
                )
                configs = {name: config for name, (_, _, config) in best.items()}
                choices.append((both, block_m, configs))
        if not choices:
            print(f"{family} up to {limit} rows: incomplete, kept")
            continue
        _, block_m, configs = min(choices, key=lambda choice: choice[0])
        entry = {"rows": limit, "block_m": block_m}
        entry |= {name: changed(config) for name, config in configs.items()}
        rows = [row for row in tables[family]["gemm"] if row["rows"] != limit]
        tables[family]["gemm"] = sorted([*rows, entry], key=lambda row: row["rows"])
        print(f"{family} up to {limit} rows: {block_m}", *map(short, configs.values()), sep=" | ")
    path.write_text(json.dumps(tables, indent=1) + "\n")


def changed(config: Gemm) -> dict[str, Any]:
    """What differs from the defaults, and what has none."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ship", nargs="+", metavar="FILE", help="results to choose from")
    parser.add_argument("--gemv", action="store_true", help="the kernels for one token instead")
    parser.add_argument("--out", default="tune.json")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--least-block-m", type=int, default=8)
    parser.add_argument("--most-block-m", type=int, default=128)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["qwen3", "mixtral"])
    parser.add_argument("--seconds", type=float, default=420, help="stop measuring after")
    args = parser.parse_args()
    if args.ship:
        ship(args.ship)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    if args.gemv:
        Path(args.out).write_text(json.dumps(search_gemv(args.families, args.shapes, args.seconds)))
        return
    jobs = [
        (f, bm, c)
        for f in args.families
        for bm, cs in candidates(f).items()
        if args.least_block_m <= bm <= args.most_block_m
        for c in cs
    ]
    compile_all(compile_one, jobs)
    results = []
    for name, family in itertools.product(args.shapes, args.families):
        e, k, h, i = SHAPES[name]
        weights = quantized(FAMILIES[family], e, h, i)
        for t in args.tokens:
            mean = t * k / e
            n = 6 if t <= 128 else 2
            ids = routings(t, e, k, n)
            best: dict[tuple[int, bool], tuple[float, Gemm]] = {}
            for block_m, configs in candidates(family).items():
                too_low = block_m < 128 and mean > (40 if block_m <= 16 else 8 * block_m)
                too_high = block_m > 16 and mean < block_m / 4
                if too_low or too_high or not args.least_block_m <= block_m <= args.most_block_m:
                    continue
                made = [route(x, e, block_m) for x in ids]
                calls = [products(weights, x, r, block_m, t, k) for x, r in zip(ids, made)]
                for is_up, config in itertools.product((True, False), configs):
                    if time.perf_counter() - started > args.seconds:
                        break
                    mine = [c[0 if is_up else 1] for c in calls]
                    try:
                        error = error_of(mine[0], config, made[0], k, is_up) if t <= 512 else 0.0
                        us = graph_us([functools.partial(c, config) for c in mine])
                    except Exception as problem:  # noqa: BLE001
                        if "memory" not in str(problem) and "resource" not in str(problem):
                            print("failed:", name, family, t, block_m, config, str(problem)[:100])
                        continue
                    results.append(
                        dict(shape=name, family=family, tokens=t, block_m=block_m, up=is_up, us=us,
                             error=error, **dataclasses.asdict(config))
                    )  # fmt: skip
                    if error > WRONG:
                        print(f"WRONG {error:.3f}:", name, family, t, block_m, is_up, config)
                        continue
                    key = (block_m, is_up)
                    if key not in best or us < best[key][0]:
                        best[key] = (us, config)
                del calls
            byts = sum(len(x.unique()) for x in ids) / n * 3 * h * i
            flops = 2 * t * k * 3 * h * i
            for bm in sorted({b for b, up in best if (b, not up) in best}):
                (u, cu), (d, cd) = best[bm, True], best[bm, False]
                print(
                    f"{name:8}{family:7} M={t:<6} bm={bm:<4} up {u:8.1f} down {d:8.1f} both"
                    f" {u + d:8.1f} us {byts / (u + d) / 1e6:5.2f} TB/s"
                    f" {flops / (u + d) / 1e6:6.0f} TF"
                    f" | {short(cu)} | {short(cd)}",
                    flush=True,
                )
        del weights
        torch.cuda.empty_cache()
        with open(args.out, "w") as file:
            json.dump(results, file)
    print(f"{time.perf_counter() - started:.0f} s")


def short(c: Gemm) -> str:
    flags = (
        ("S" if c.swap else "")
        + ("P" if c.promote else "")
        + (f"r{c.registers}" if c.registers else "")
        + (f"t{c.tail_m}" if c.tail_m else "")
        + ("H" if c.halves else "")
    )
    return f"{c.block_n}x{c.block_k} w{c.warps} s{c.stages} g{c.group_m} {flags}"


if __name__ == "__main__":
    main()
