"""Checkpoints that are published quantized, seen as the unquantized model that they stand for.

    mxfp4        X_blocks uint8 [E, N, K / 32, 16], X_scales uint8 [E, N, K / 32] -> X [E, K, N]
    fp8 blocks   X e4m3 [N, K], X_scale_inv [ceil(N / bn), ceil(K / bk)] -> X [N, K]

Pairs of codes and scales become one tensor with the name, shape and dtype (bf16) that it has in the
unquantized model, so that whatever follows need not know; `moeq.checkpoint.stream` reads both, and
`moeq.checkpoint.encodings` decodes.

Left out: one scale a tensor, stacked experts in fp8, scales as e8m0, static scales of activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.encodings import DAMAGED, EncodedSpec, Encoding, Fp8Blocks, Mxfp4
from moeq.checkpoint.headers import TensorSpec, read_headers
from moeq.errors import CheckpointError

KNOWN = "mxfp4, or fp8 with a weight_block_size"


def is_encoded(quantization: Any) -> bool:
    """Whether a checkpoint of which config.json says this is decoded here."""
    if not isinstance(quantization, dict):
        return False
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    return method == "mxfp4" or (method == "fp8" and _is_size(block))


def _is_size(block: Any) -> bool:
    is_pair = isinstance(block, list) and len(block) == 2
    return is_pair and all(type(size) is int and size > 0 for size in block)


def read_specs(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """`read_headers`, and pairs as one tensor each where the config.json beside them says so."""
    files = [Path(file) for file in files]
    specs = read_headers(files)
    try:
        entries = json.loads((files[0].parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever needs a config complains
        return specs
    if not isinstance(entries, dict):
        return specs
    return logical(specs, entries.get("quantization_config"))


def logical(specs: Mapping[str, TensorSpec], quantization: Any) -> dict[str, TensorSpec]:
    """Tensors as the unquantized model has them.

    Args:
        specs: as stored.
        quantization: what config.json says.

    Raises:
        CheckpointError: codes without scales, scales without codes, a shape or dtype that does not
            fit, or no codes at all.
    """
    if not is_encoded(quantization):
        return dict(specs)
    found: dict[str, TensorSpec] = {}
    scales = set()
    method = quantization["quant_method"]
    for spec in specs.values():
        pair = _mxfp4(spec, specs) if method == "mxfp4" else _fp8(spec, specs, quantization)
        if pair is None:
            continue
        if pair.name != spec.name and pair.name in specs:
            raise CheckpointError(
                f"{spec.file.name}: {spec.name!r} encodes {pair.name!r}, which is there too",
                hint=DAMAGED,
            )
        found[spec.name] = pair
        scales.add(pair.scales.name)
    if not found:
        raise CheckpointError(
            f"config.json says {method}, and no tensor of the checkpoint is stored so",
            hint="of an unquantized checkpoint remove quantization_config from config.json",
        )
    suffix = "_scales" if method == "mxfp4" else "_scale_inv"
    for spec in specs.values():
        if spec.name.endswith(suffix) and spec.name not in scales:
            raise CheckpointError(
                f"{spec.file.name}: {spec.name!r} scales codes that are not there", hint=DAMAGED
            )
    pairs = (found.get(spec.name, spec) for spec in specs.values() if spec.name not in scales)
    return {spec.name: spec for spec in pairs}


def _mxfp4(codes: TensorSpec, specs: Mapping[str, TensorSpec]) -> EncodedSpec | None:
    base, is_blocks, _ = codes.name.rpartition("_blocks")
    if not is_blocks or codes.name != f"{base}_blocks":
        return None
    is_right = codes.dtype == torch.uint8 and len(codes.shape) == 4 and codes.shape[3] == 16
    if not is_right or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.file.name}: {codes.name!r} is {codes.dtype} {list(codes.shape)}, expected"
            " uint8 [experts, rows, blocks, 16]",
            hint=DAMAGED,
        )
    e, n, blocks, _ = codes.shape
    scales = _scales(codes, f"{base}_scales", (e, n, blocks), (torch.uint8,), specs)
    return _pair(base, codes, scales, (e, 32 * blocks, n), Mxfp4())


def _fp8(
    codes: TensorSpec, specs: Mapping[str, TensorSpec], quantization: dict[str, Any]
) -> EncodedSpec | None:
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return None
    if codes.dtype != torch.float8_e4m3fn or len(codes.shape) != 2 or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.file.name}: {codes.name!r} is {codes.dtype} {list(codes.shape)}, expected"
            " float8_e4m3fn [rows, columns]",
            hint="moeq reads fp8 of one matrix a tensor",
        )
    rows, columns = quantization["weight_block_size"]
    n, k = codes.shape
    grid = math.ceil(n / rows), math.ceil(k / columns)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    scales = _scales(codes, f"{codes.name}_scale_inv", grid, dtypes, specs)
    encoding = Fp8Blocks(rows, columns, scales.dtype)
    return _pair(codes.name, codes, scales, (n, k), encoding)


def _scales(
    codes: TensorSpec,
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    specs: Mapping[str, TensorSpec],
) -> TensorSpec:
    if name not in specs:
        raise CheckpointError(
            f"{codes.file.name}: {codes.name!r} holds codes, and their scales, {name!r}, are not"
            " in the checkpoint",
            hint=DAMAGED,
        )
    scales = specs[name]
    if scales.shape != shape or scales.dtype not in dtypes:
        raise CheckpointError(
            f"{scales.file.name}: {name!r} is {scales.dtype} {list(scales.shape)}, expected"
            f" {dtypes[0]} {list(shape)} for codes {list(codes.shape)}",
            hint=DAMAGED,
        )
    return scales


def _pair(
    name: str,
    codes: TensorSpec,
    scales: TensorSpec,
    shape: tuple[int, ...],
    encoding: Encoding,
) -> EncodedSpec:
    return EncodedSpec(
        name=name,
        dtype=torch.bfloat16,
        shape=shape,
        file=codes.file,
        offset=codes.offset,
        nbytes=codes.nbytes + scales.nbytes,
        stamp=codes.stamp,
        codes=codes,
        scales=scales,
        encoding=encoding,
    )
