"""Which path and tiling a layer takes: from the number of tokens, by a table that ships as data.

`tilings.json` holds what a search on an H100 found (benchmarks/tune.py), by *family* (how codes
meet rows) and by the expected number of rows per active expert

    r = T * k / D,   D = E * (1 - (1 - 1/E)^(T * k))

because that, and not T, says how full a tile gets. The true D is known on the device alone. On GPUs
with less shared memory tilings shrink until they fit; nothing is ever measured at run time.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from moeq.kernels.triton.layer import (
    Arithmetic,
    Gemm,
    GemmPath,
    Gemv,
    GemvPath,
    LibraryPath,
    Path,
)
from moeq.schemes import Granularity, OnlineQuantScheme

FP8_CAPABILITY = (8, 9)
"""First compute capability with fp8 tensor cores."""

_PDL_CAPABILITY = (9, 0)

_LIBRARY_CAPABILITIES = (9, 10)
"""Major compute capabilities for which `torch._grouped_mm` has kernels of its own; elsewhere it
asks the device how many rows there are. It wants strides of 16 bytes, and fewer groups than"""

_LIBRARY_EXPERTS = 1024

DEEP = 4096
"""Columns above which w2 may have a tiling of its own: "deep" in the table."""


@dataclass(frozen=True)
class Gpu:
    """What decides about kernels: compute capability and shared memory of a block, in bytes."""

    capability: tuple[int, int]
    shared_memory: int


INTERPRETER = Gpu((8, 9), 227 << 10)
"""What Triton's interpreter passes for: fp8, but no programmatic launches."""


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU at `device`, which has an index; for a CPU the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    from triton.runtime import driver

    index = device.index
    properties = driver.active.utils.get_device_properties(index)
    return Gpu(torch.cuda.get_device_capability(index), properties["max_shared_mem"])


@functools.cache
def arithmetic(device: torch.device, scheme: OnlineQuantScheme) -> Arithmetic:
    """What products are made of: fp8 without fp8 units is weight-only, in the rows' dtype."""
    capability = gpu(device).capability
    is_fp8 = scheme.weight_dtype == torch.float8_e4m3fn
    has_fp8 = capability >= FP8_CAPABILITY
    return Arithmetic(
        codes=scheme.quantizes_activations and (has_fp8 or not is_fp8),
        fp8_bits=is_fp8 and not has_fp8,
        pdl=capability >= _PDL_CAPABILITY,
        ptx=gpu(device) is not INTERPRETER,
    )


@functools.lru_cache(maxsize=4096)
def choose(
    device: torch.device,
    scheme: OnlineQuantScheme,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    *,
    library: bool = True,
) -> Path:
    """The path of one layer.

    Args:
        device: where it runs.
        scheme: what the codes mean.
        dtype: of the rows.
        shape: T, k, E, H, I; all positive. Of a single projection the rows and the columns.
        library: whether the whole layer may go to `moeq.kernels.triton.library`.
    """
    t, k, e, h, i = shape
    math = arithmetic(device, scheme)
    pairs = t * k
    active = e * (1 - (1 - 1 / e) ** pairs)
    rows = pairs / active
    table = _tilings()[_family(scheme, math)]
    if t <= table["gemv"]["tokens"] and rows <= table["gemv"]["shared"]:
        down = next((row for row in table["gemv"]["down"] if k <= row["top_k"]), None)
        if down is not None:
            return GemvPath(Gemv(*table["gemv"]["up"]), Gemv(*down["tiling"]))
    part = table.get("library")
    if (
        library
        and part is not None
        and not math.fp8_bits
        and rows >= part["rows"]
        and dtype == torch.bfloat16
        and gpu(device).capability[0] in _LIBRARY_CAPABILITIES
        and h % 8 == 0
        and i % 8 == 0
        and e < _LIBRARY_EXPERTS
    ):
        return LibraryPath(part["scratch"])
    entry = next(row for row in table["gemm"] if rows <= row["rows"])
    limit = gpu(device).shared_memory
    sizes = _sizes(scheme, math, dtype)
    below = "deep" if i > DEEP and "deep" in entry else "down"
    up, down = (
        fitted(Gemm(**entry[name]), entry["block_m"], sizes, limit) for name in ("up", below)
    )
    return GemmPath(entry["block_m"], up, down)


def fitted(config: Gemm, block_m: int, sizes: tuple[float, float], limit: int) -> Gemm:
    """The tiling itself, or one with fewer stages, then fewer columns, that fits into `limit` bytes
    of shared memory. `sizes`: bytes of an element of the rows and of the weight."""
    while shared_memory(config, block_m, sizes) > limit:
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.block_n > 64:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config


def shared_memory(config: Gemm, block_m: int, sizes: tuple[float, float]) -> int:
    """Bytes of shared memory that a tiling takes: its stages, and the decoded weight tile, where
    that does not stay in registers."""
    rows, codes = sizes
    stage = config.block_k * (block_m * rows + config.block_n * codes)
    decoded = config.block_k * config.block_n * rows if rows > codes and not config.swap else 0
    return int(config.stages * stage + decoded)


def least_shared_memory(scheme: OnlineQuantScheme, math: Arithmetic, dtype: torch.dtype) -> int:
    """Bytes of shared memory below which some number of tokens has no tiling."""
    sizes = _sizes(scheme, math, dtype)
    return max(
        shared_memory(
            fitted(Gemm(**entry[name]), entry["block_m"], sizes, 0), entry["block_m"], sizes
        )
        for entry in _tilings()[_family(scheme, math)]["gemm"]
        for name in ("up", "down", "deep")
        if name in entry
    )


def _sizes(scheme: OnlineQuantScheme, math: Arithmetic, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of an element of the rows, and of the weight, as a product loads them."""
    return (1 if math.codes else dtype.itemsize), (1 if scheme.group is None else 0.5)


def _family(scheme: OnlineQuantScheme, math: Arithmetic) -> str:
    """How codes meet rows."""
    by_block = scheme.granularity is Granularity.BLOCK
    if scheme.group is not None:
        return "decode_groups"
    if not math.codes:
        return "decode_block" if by_block else "decode"
    if scheme.weight_dtype == torch.int8:
        return "int8"
    return "fp8_block" if by_block else "fp8"


@functools.cache
def _tilings() -> Any:
    text = resources.files("moeq.kernels.triton").joinpath("tilings.json").read_text()
    return json.loads(text)
