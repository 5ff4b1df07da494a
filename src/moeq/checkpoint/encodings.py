"""Tensors that a checkpoint stores as codes and scales, decoded to bf16 a piece at a time.

    mxfp4        w = e2m1(nibble) * 2^(scale - 127), exact; low nibble first, a scale for 32
    fp8 blocks   w = fp32(code) * fp32(scale), rounded once to bf16; a scale for bn x bk

These are the numbers of transformers 5.23 (`Mxfp4Dequantize`, `Fp8Dequantize`), which decodes a
layer as a whole. It takes the size of fp8 blocks from the shape of the scales: wrong, or an error,
where the last block is cut off. Here config.json says it, see `moeq.checkpoint.published`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moeq.checkpoint.headers import TensorSpec
from moeq.errors import NonFiniteError

DAMAGED = "the checkpoint is damaged, or mixed with another; get it again"

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
        hint=DAMAGED,
    )
