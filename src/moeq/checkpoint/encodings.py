"""Checkpoints that are published quantized: codes and scales, seen as the bf16 that they encode.

    mxfp4        X_blocks uint8 [E, N, K / 32, 16], X_scales uint8 [E, N, K / 32]
                 w = e2m1(nibble) * 2^(scale - 127), low nibble first; X is bf16 [E, K, N]
    fp8 blocks   X e4m3 [N, K], X_scale_inv [ceil(N / bn), ceil(K / bk)]
                 w = fp32(code) * fp32(scale), rounded once to bf16; X is bf16 [N, K]

`logical` makes one tensor of each pair, with the name, shape and dtype that it has in the
unquantized model, so that whatever follows need not know; `moeq.checkpoint.stream` reads both and
decodes a piece at a time. The numbers are those of transformers 5.23 (`Mxfp4Dequantize`,
`Fp8Dequantize`), which decodes a layer as a whole, and takes the size of fp8 blocks from the shape
of the scales: wrong, or an error, where the last block is cut off. Here config.json says it.

Left out: one scale a tensor, stacked experts in fp8, scales as e8m0, static scales of activations.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from moeq.checkpoint.headers import TensorSpec, read_headers
from moeq.errors import CheckpointError, NonFiniteError

KNOWN = "mxfp4, or fp8 with a weight_block_size"

_DAMAGED = "the checkpoint is damaged, or mixed with another; get it again"

_CHUNK = {"cpu": 1 << 18}
"""Elements decoded at a time, by device type: see `moeq.quantize._CHUNK`."""

_CHUNK_ELSEWHERE = 1 << 22


def decoding_bytes(device: torch.device, elements: int) -> int:
    """That decoding so many numbers at once takes beside the result: an index, a value and a scale
    each, in four bytes, and as much again for what is small."""
    return 16 * min(elements, _CHUNK.get(device.type, _CHUNK_ELSEWHERE))


class Encoding(Protocol):
    """How codes and scales stand for numbers.

    Attributes:
        is_flipped: see `TensorSpec`.
    """

    is_flipped: ClassVar[bool]

    def scales_of(self, spec: EncodedSpec, begin: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """(first byte from that of the scales, bytes) that belong to a piece of the codes."""

    def decode(self, codes: Tensor, scales: Tensor, piece: Tensor, begin: int) -> None:
        """Write what uint8 codes and scales, as `scales_of` chose them, stand for into bf16
        `piece`, in the orientation in which it is stored; `begin` as there."""

    def find_bad(self, scales: memoryview) -> int | None:
        """The first scale among those in memory that is not a number, counted from 0."""


@dataclass(frozen=True)
class EncodedSpec(TensorSpec):
    """A tensor of the unquantized model that is stored as two.

    `name`, `dtype` and `shape` are those of the unquantized model; `file`, `offset` and `stamp` are
    those of the codes; `nbytes` is of codes and scales.

    Attributes:
        codes: as stored.
        scales: as stored.
        encoding: of them.
    """

    codes: TensorSpec
    scales: TensorSpec
    encoding: Encoding

    @property
    def keys(self) -> tuple[str, ...]:
        return self.codes.name, self.scales.name

    @property
    def data_bytes(self) -> int:
        return self.codes.nbytes

    @property
    def held_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_flipped(self) -> bool:
        return self.encoding.is_flipped


@dataclass(frozen=True)
class Mxfp4:
    """fp4 e2m1, with a power of two for every 32 along a row (OCP Microscaling Formats 1.0)."""

    is_flipped: ClassVar[bool] = True

    def scales_of(self, spec: EncodedSpec, begin: int, shape: tuple[int, ...]) -> tuple[int, int]:
        return begin // 16, math.prod(shape) // 32

    def decode(self, codes: Tensor, scales: Tensor, piece: Tensor, begin: int) -> None:
        table = _pairs(piece.device)
        blocks, out = codes.view(-1, 16), piece.view(-1, 32)
        step = max(1, _CHUNK.get(piece.device.type, _CHUNK_ELSEWHERE) // 32)
        for first in range(0, len(blocks), step):
            some, exponents = blocks[first : first + step], scales[first : first + step, None]
            values = _look_up(table, some).view(torch.bfloat16).view(-1, 32)
            # The bits of 2^(e - 127); the least, 2^-127, is a subnormal
            bits = exponents.to(torch.int16) << 7
            powers = torch.where(exponents == 0, 1 << 6, bits).view(torch.bfloat16)
            torch.mul(values, powers, out=out[first : first + step])  # exact

    def find_bad(self, scales: memoryview) -> int | None:
        """255 is NaN."""
        at = scales.tobytes().find(b"\xff")
        return None if at < 0 else at


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """[n] of `table`, for n uint8 codes of any shape. On a CPU five times as fast as to convert
    fp8, and twice as fast as to index."""
    return table.index_select(0, codes.flatten().int())


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """int32 [256]: the bits of both bf16 numbers in a byte."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], 1)
    return pairs.view(torch.int32).flatten().to(device)


@functools.cache
def _e4m3(device: torch.device) -> Tensor:
    """fp32 [256]."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@dataclass(frozen=True)
class Fp8Blocks:
    """fp8 e4m3, with a scale for every `rows` x `columns`; those at the ends may be smaller."""

    is_flipped: ClassVar[bool] = False

    rows: int
    columns: int
    scale_dtype: torch.dtype

    def scales_of(self, spec: EncodedSpec, begin: int, shape: tuple[int, ...]) -> tuple[int, int]:
        (_, k), (n, _) = spec.stored_shape, shape
        width = self.scale_dtype.itemsize * math.ceil(k / self.columns)
        first, end = begin // k // self.rows, math.ceil((begin // k + n) / self.rows)
        return first * width, (end - first) * width

    def decode(self, codes: Tensor, scales: Tensor, piece: Tensor, begin: int) -> None:
        n, k = piece.shape
        table, codes = _e4m3(piece.device), codes.view(n, k)
        grid = scales.view(self.scale_dtype).float().view(-1, math.ceil(k / self.columns))
        wide = grid.repeat_interleave(self.columns, 1)[:, :k]
        offset = begin // k % self.rows
        block = (torch.arange(n, device=piece.device) + offset) // self.rows
        step = max(1, _CHUNK.get(piece.device.type, _CHUNK_ELSEWHERE) // k)
        for first in range(0, n, step):
            some = slice(first, first + step)
            values = _look_up(table, codes[some]).view(-1, k)
            piece[some] = values.mul_(wide[block[some]])

    def find_bad(self, scales: memoryview) -> int | None:
        found = torch.frombuffer(scales, dtype=self.scale_dtype)
        bad = torch.nonzero(~torch.isfinite(found.float()))
        return int(bad[0]) if len(bad) else None


def check_scales(spec: EncodedSpec, first: int, scales: memoryview) -> None:
    """That scales are numbers.

    Args:
        spec: whose.
        first: byte of all of its scales that the first of these is at.
        scales: some of them, writable.

    Raises:
        NonFiniteError: naming file, tensor and place of one that is not.
    """
    at = spec.encoding.find_bad(scales)
    if at is None:
        return
    flat = torch.tensor(first // spec.scales.dtype.itemsize + at)
    where = [int(index) for index in torch.unravel_index(flat, spec.scales.shape)]
    raise NonFiniteError(
        f"{spec.scales.file.name}: {spec.scales.name!r}: the scale at {where} is not a number",
        hint=_DAMAGED,
    )


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
                hint=_DAMAGED,
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
                f"{spec.file.name}: {spec.name!r} scales codes that are not there", hint=_DAMAGED
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
            hint=_DAMAGED,
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
            hint=_DAMAGED,
        )
    scales = specs[name]
    if scales.shape != shape or scales.dtype not in dtypes:
        raise CheckpointError(
            f"{scales.file.name}: {name!r} is {scales.dtype} {list(scales.shape)}, expected"
            f" {dtypes[0]} {list(shape)} for codes {list(codes.shape)}",
            hint=_DAMAGED,
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
