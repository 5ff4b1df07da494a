"""What a safetensors checkpoint holds, from its headers alone.

A file is `u64 length | JSON header | data`; the header maps names to dtype, shape and a byte range
of the data (format: https://github.com/huggingface/safetensors). Everything is checked here, before
memory is taken: a header that lies about its file, names in two shards, an index that disagrees
with the shards, files and links that lead out of the folder. safetensors' own errors do not name
the file; ours do.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeq.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

VARIANT = "moeq"
"""How transformers calls files of weights that it should not take by itself."""

QUANTIZED_INDEX = f"model.safetensors.index.{VARIANT}.json"
QUANTIZED_SINGLE = f"model.{VARIANT}.safetensors"

_MAX_HEADER = 100 << 20
"""The format's own limit for the JSON header, in bytes."""

_LONGEST_NAME = 1000
"""Characters. Published ones have a tenth; numbers in longer ones take Python for ever to read."""

_GET_AGAIN = "the file is damaged or was made wrong; get it again"
_DOWNLOAD = "download the checkpoint again; it is incomplete, or mixed with another"

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
    """Where one tensor lies and what it is.

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
                    hint=_DOWNLOAD,
                )
            specs[spec.name] = spec
    for name in (INDEX_NAME, QUANTIZED_INDEX):
        index = files[0].parent / name
        if len(files) > 1 and index.exists():
            _check_index(index, specs)
    return specs


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in the order of their names.

    Raises:
        CheckpointError: no config, no weights, weights only as pickle, a missing shard, a shard
            or a link outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json", hint="a model folder holds config.json and *.safetensors"
        )
    _check_links(folder)
    names = ((SINGLE_NAME, INDEX_NAME), (QUANTIZED_SINGLE, QUANTIZED_INDEX))
    for single, index_name in names:
        if (folder / single).exists():  # where both are, transformers takes this one
            return [_regular(folder / single)]
        index = folder / index_name
        if index.exists():
            return _listed(index)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise CheckpointError(
            f"{folder}: shards ({found[0]}, ...) without {INDEX_NAME}", hint=_DOWNLOAD
        )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder}: weights only as pickle ({pickles[0]}), which can run code when opened",
            hint="convert it to safetensors with a tool that you trust",
        )
    raise CheckpointError(f"{folder}: no weights", hint=f"expected {SINGLE_NAME} or {INDEX_NAME}")


def _listed(index: Path) -> list[Path]:
    """The shards of an index."""
    folder = index.parent
    shards = sorted(set(_weight_map(index).values()))
    for shard in shards:
        _check_shard_name(shard, index)
        if not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / shard}: missing, though {index.name} lists it",
                hint="download the checkpoint again; the first one was interrupted",
            )
    return [_regular(folder / shard) for shard in shards]


def _check_links(folder: Path) -> None:
    """That no file is a link out of the folder: what it leads to could be anybody's. The hub's
    cache links snapshots/<revision>/<file> to blobs/<hash> of the same model."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir():
            end = Path(os.path.realpath(path))  # `resolve` raises for a link to itself
            if not (end.is_relative_to(root) or end.is_relative_to(blobs)):
                raise CheckpointError(
                    f"{path}: a link to {end}, outside of the folder",
                    hint="copy the file itself into the folder",
                )


def _regular(file: Path) -> Path:
    """The file, which a folder, pipe or device is not: those can block whoever opens them."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise CheckpointError(
            f"{file}: not a regular file", hint="a folder, pipe or device is there; get the file"
        )
    return file


def _file_specs(file: Path) -> Iterator[TensorSpec]:
    try:
        with open(_regular(file), "rb") as handle:
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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        entries = json.loads(_regular(index).read_text(encoding="utf-8"))
        weight_map = entries["weight_map"]
        if not isinstance(entries["metadata"], dict):  # transformers reads and changes it
            raise TypeError("metadata that is no object")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard whose name is not text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({error!r})", hint=_DOWNLOAD
        ) from None
    if not weight_map:
        raise CheckpointError(f"{index}: lists no tensors", hint=_DOWNLOAD)
    return dict(weight_map)


def _check_shard_name(shard: str, index: Path) -> None:
    if Path(shard).name != shard or not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: shard {shard!r} is not a file name of this folder",
            hint="a checkpoint's shards lie beside its index, as *.safetensors",
        )


def _check_index(index: Path, specs: dict[str, TensorSpec]) -> None:
    weight_map = _weight_map(index)
    for name, shard in weight_map.items():
        if name not in specs:
            raise CheckpointError(
                f"{index}: lists tensor {name!r}, which no shard holds (expected in {shard})",
                hint=_DOWNLOAD,
            )
        if specs[name].file.name != shard:
            raise CheckpointError(
                f"{index}: says {name!r} is in {shard}, found in {specs[name].file.name}",
                hint=_DOWNLOAD,
            )
    extra = specs.keys() - weight_map.keys()
    if extra:
        name = min(extra)
        raise CheckpointError(
            f"{specs[name].file}: tensor {name!r} is not in {index.name}", hint=_DOWNLOAD
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
