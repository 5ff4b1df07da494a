"""What a safetensors checkpoint holds, from its headers alone.

A file is `u64 length | JSON header | data`; the header maps names to dtype, shape and a byte range
of the data (format: https://github.com/huggingface/safetensors). Everything is checked here, before
memory is taken: a header that lies about its file, names in two shards, an index that disagrees
with the shards. safetensors' own errors do not name the file; ours do.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.folder import (
    DOWNLOAD,
    INDEX_NAME,
    QUANTIZED_INDEX,
    regular,
    weight_map_of,
)
from moeq.errors import CheckpointError

_MAX_HEADER = 100 << 20
"""The format's own limit for the JSON header, in bytes."""

_LONGEST_NAME = 1000
"""Characters. Published ones have a tenth; numbers in longer ones take Python for ever to read."""

_GET_AGAIN = "the file is damaged or was made wrong; get it again"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class FileStamp:
    """Which file it was, and when it was last written."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies and what it is; `moeq.checkpoint.encodings` has some that are stored as
    two.

    Attributes:
        name: in the checkpoint.
        dtype: of the stored elements.
        shape: row-major.
        file: that holds it.
        offset: of its first byte from the start of the file.
        nbytes: of its data.
        stamp: of the file when its header was read.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stamp: FileStamp

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of what is stored for it."""
        return (self.name,)

    @property
    def data_bytes(self) -> int:
        """From `offset` on; scales not counted."""
        return self.nbytes

    @property
    def held_bytes(self) -> int:
        """Of the tensor in memory."""
        return self.nbytes

    @property
    def is_flipped(self) -> bool:
        """Whether its matrices are stored the other way around than `shape` says."""
        return False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if not self.is_flipped:
            return self.shape
        *stacked, rows, columns = self.shape
        return (*stacked, columns, rows)


def read_headers(files: Iterable[Path]) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint by name.

    Args:
        files: all shards. An index beside the first is held against them.

    Raises:
        CheckpointError: for anything that is not a whole, consistent checkpoint.
    """
    files = [Path(file) for file in files]
    specs: dict[str, TensorSpec] = {}
    for file in files:
        for spec in _file_specs(file):
            if spec.name in specs:
                raise CheckpointError(
                    f"{file.name}: tensor {spec.name!r} is also in {specs[spec.name].file.name}",
                    hint=DOWNLOAD,
                )
            specs[spec.name] = spec
    for name in (INDEX_NAME, QUANTIZED_INDEX):
        index = files[0].parent / name
        if len(files) > 1 and index.exists():
            _check_index(index, specs)
    return specs


def _file_specs(file: Path) -> Iterator[TensorSpec]:
    try:
        with open(regular(file), "rb") as handle:
            stamp = FileStamp.of(os.fstat(handle.fileno()))
            size = stamp.size
            head = handle.read(8)
            if head.startswith(b"version "):
                raise CheckpointError(
                    f"{file}: a git-lfs pointer, not the weights",
                    hint="run `git lfs pull` in its repository",
                )
            if head.lower().startswith((b"<!doctyp", b"<html")):
                raise CheckpointError(
                    f"{file}: an HTML page, not the weights",
                    hint="download it again, logged in if the site asks for that",
                )
            if len(head) < 8:
                raise CheckpointError(
                    f"{file}: {size} bytes, too short for a safetensors file", hint=_GET_AGAIN
                )
            (length,) = struct.unpack("<Q", head)
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file}: header of {length} bytes in a file of {size}: not safetensors,"
                    " or cut off",
                    hint=_GET_AGAIN,
                )
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{file}: {error.strerror}", hint="check that it is there and may be read"
        ) from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not JSON: {error}", hint=_GET_AGAIN) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object", hint=_GET_AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{file}: __metadata__ of the header is not an object of texts", hint=_GET_AGAIN
        )
    start, end = 8 + length, 0
    ranges = []
    for name, entry in header.items():
        spec, begin, stop = spec_of(file, name, entry, start, stamp)
        ranges.append((begin, stop, name))
        end = max(end, stop)
        yield spec
    if start + end != size:
        raise CheckpointError(
            f"{file}: tensors end at byte {start + end}, the file at {size}", hint=_GET_AGAIN
        )
    at, before = 0, "the header"
    for begin, stop, name in sorted(ranges):
        if begin != at:
            raise CheckpointError(
                f"{file}: bytes of {before} and {name!r} overlap or leave a gap", hint=_GET_AGAIN
            )
        at, before = stop, repr(name)


def spec_of(
    file: Path, name: str, entry: Any, start: int, stamp: FileStamp
) -> tuple[TensorSpec, int, int]:
    """One entry of a header: (tensor, first byte of the data, byte after its last).

    Args:
        file: it is of.
        name: of the tensor.
        entry: {"dtype", "shape", "data_offsets"} as parsed from JSON.
        start: of the file's data, in bytes.
        stamp: of the file.

    Raises:
        CheckpointError: whatever does not describe a tensor.
    """
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{file}: tensor name {name[:40]!r}... has {len(name)} characters", hint=_GET_AGAIN
        )
    if not name or not name.isprintable():
        raise CheckpointError(
            f"{file}: tensor name {name!r} is empty or holds control characters", hint=_GET_AGAIN
        )
    if name.startswith("/") or ".." in name.split("/"):
        raise CheckpointError(f"{file}: tensor name {name!r} is a path", hint=_GET_AGAIN)
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: entry of {name!r} is malformed", hint=_GET_AGAIN) from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name!r} has dtype {dtype!r}, which moeq does not read",
            hint=f"moeq reads {', '.join(DTYPES)}",
        )
    numbers = [*shape, begin, stop] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise CheckpointError(
            f"{file}: {name!r} has impossible shape or offsets {numbers}", hint=_GET_AGAIN
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name!r} takes {stop - begin} bytes, its shape {shape} needs {nbytes}",
            hint=_GET_AGAIN,
        )
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape), file, start + begin, nbytes, stamp)
    return spec, begin, stop


def _check_index(index: Path, specs: dict[str, TensorSpec]) -> None:
    weight_map = weight_map_of(index)
    for name, shard in weight_map.items():
        if name not in specs:
            raise CheckpointError(
                f"{index}: lists tensor {name!r}, which no shard holds (expected in {shard})",
                hint=DOWNLOAD,
            )
        if specs[name].file.name != shard:
            raise CheckpointError(
                f"{index}: says {name!r} is in {shard}, found in {specs[name].file.name}",
                hint=DOWNLOAD,
            )
    extra = specs.keys() - weight_map.keys()
    if extra:
        name = min(extra)
        raise CheckpointError(
            f"{specs[name].file}: tensor {name!r} is not in {index.name}", hint=DOWNLOAD
        )


def _no_constant(text: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{text} is no JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name!r} twice")
            seen.add(name)
    return entries
