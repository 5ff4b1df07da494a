"""Weights to codes on one GPU: how close to a copy each quantizer comes.

    python benchmarks/quantizers.py

Bytes read and written in a second, over those of `Tensor.copy_` in the same run. Matrices are all
of one Qwen3-30B-A3B layer, as one launch of many, and one large one; larger than the cache.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable

import torch

from moeq.experts import code_columns, group_shape, scale_shape
from moeq.kernels.triton.weights import quantize_weights
from moeq.schemes import Granularity, OnlineQuantScheme
from moeq.span import Span

SHAPES = ((128, 768, 2048), (128, 2048, 768), (8, 14336, 4096), (1, 16384, 16384))


def microseconds(run: Callable[[], object]) -> float:
    """Median of single launches."""
    times = []
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)  # so that the launches wait for the GPU and not it for them
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    kinds = {(s.granularity, s.weight_dtype, s.group_dtype): s for s in OnlineQuantScheme}
    for shape in SHAPES:
        weights = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        out = torch.empty_like(weights)
        copy = 2 * weights.nbytes / microseconds(functools.partial(out.copy_, weights)) / 1e6
        print(f"{'x'.join(map(str, shape)):16} copy {copy:.2f} TB/s", flush=True)
        (e, n, k), spans = shape, [Span.of(w) for w in weights]
        for scheme in kinds.values():
            granularity, dtype = scheme.granularity, scheme.weight_dtype
            codes = torch.empty(e, n, code_columns(scheme, k), dtype=dtype, device="cuda")
            scales = torch.empty(e, math.prod(scale_shape(granularity, (n, k))), device="cuda")
            grid = group_shape(scheme, shape)
            groups = (
                None if grid is None else torch.empty(grid, dtype=scheme.group_dtype, device="cuda")
            )
            at, scales_at, groups_at = (
                [] if t is None else [i * t[0].numel() for i in range(e)]
                for t in (codes, scales, groups)
            )
            given = (spans, codes, scales, at, scales_at, granularity, groups, groups_at)
            us = microseconds(functools.partial(quantize_weights, *given))
            written = codes.nbytes + (0 if groups is None else groups.nbytes)
            rate = (weights.nbytes + written) / us / 1e6
            again = "  (amax first)" if granularity is Granularity.TENSOR else ""
            name = f"{str(dtype).removeprefix('torch.')} {granularity.value}"
            name = name if grid is None else scheme.value
            print(f"  {name:24}{us:9.1f} us {rate:6.2f} TB/s {rate / copy:5.2f}{again}", flush=True)


if __name__ == "__main__":
    main()
