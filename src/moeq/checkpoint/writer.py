"""A folder that appears whole or not at all.

Everything is written beside the target, brought to the disk, described by a manifest of sizes and
SHA-256 sums, and renamed into place last: a crash, a full disk or Ctrl-C leaves what was there. A
process that is killed leaves `.<name>.<random>.partial` beside the target, which nothing reads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from moeq.checkpoint.headers import DTYPES
from moeq.errors import CheckpointError

MANIFEST_NAME = "moeq.json"

_ALIGNMENT = 64
"""Bytes, of where a file's data starts: a cache line."""

_SPARE = 64 << 20
"""Bytes asked for beyond what the weights take: config, tokenizer, headers."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def new_folder(target: Path, nbytes: int, *, keep: str | None = None) -> Iterator[Path]:
    """A folder to write into; what is in it is at `target` once the block ends well.

    Args:
        target: that does not exist yet, or is an empty folder.
        nbytes: that will be written, about.
        keep: what is being written. Under this name it stays if the block fails, and is there again
            the next time.

    Raises:
        CheckpointError: the target exists, cannot be made or written, or its disk is too small; or
            another process writes the same.
    """
    target = target.expanduser()
    staging = target.parent / f".{target.name}.{keep or secrets.token_hex(4)}.partial"
    absent: list[Path] = []
    with contextlib.ExitStack() as alone:
        try:
            absent = [folder for folder in target.parents if not folder.exists()]
            _check_target(target, nbytes - _bytes_in(staging))
            target.parent.mkdir(parents=True, exist_ok=True)
            if keep is not None:
                alone.enter_context(_alone(staging))
            staging.mkdir(exist_ok=keep is not None)
            yield staging
            _finish(staging)
            staging.rename(target)  # also over an empty folder
            _sync(target.parent)
        except BaseException as error:
            if keep is None:
                shutil.rmtree(staging, ignore_errors=True)
                for folder in absent:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            if isinstance(error, OSError):
                raise _failure(error, staging, target, is_kept=keep is not None) from error
            raise


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    lock = FileLock(staging.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"{staging}: another process writes it") from None
    try:
        yield
    finally:
        staging.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def _check_target(target: Path, nbytes: int) -> None:
    """That nothing is there yet, and that there is room."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise CheckpointError(f"{target}: exists", hint="name a new folder, or remove this one")
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SPARE:
        raise CheckpointError(
            f"{parent}: {free / 1e9:.1f} GB free, {(nbytes + _SPARE) / 1e9:.1f} GB needed",
            hint=f"make room (killed runs leave .{target.name}.*.partial), or name another disk",
        )


def _failure(error: OSError, staging: Path, target: Path, *, is_kept: bool) -> CheckpointError:
    """What the system said of a file that was being written, or of the folder."""
    place = str(error.filename or target).replace(str(staging), str(target))
    hint = "name a new folder where you may write"
    if error.errno in _NO_ROOM:
        left = f"what is finished stays in {staging}" if is_kept else "what was written is removed"
        hint = f"make room, or name a folder on another disk; {left}"
    return CheckpointError(f"{place}: {error.strerror or error}", hint=hint)


class Finished:
    """Which files of a folder are whole, kept in the folder.

    Args:
        folder: that `new_folder` gave. What is not whole in it is removed: it can be half a file,
            or belong to what the source was before.
    """

    _NAME = ".finished.json"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
            found = json.loads((folder / self._NAME).read_text(encoding="utf-8"))
            self._sizes = {str(name): int(size) for name, size in found.items()}
        for path in folder.iterdir():
            if path.name != self._NAME and path.name not in self:
                path.unlink()

    def __contains__(self, name: str) -> bool:
        path = self._folder / name
        return name in self._sizes and path.is_file() and path.stat().st_size == self._sizes[name]

    def add(self, name: str) -> None:
        """A file is whole: it is brought to the disk, and then that is."""
        path, own = self._folder / name, self._folder / self._NAME
        _sync(path)
        self._sizes[name] = path.stat().st_size
        draft = own.with_suffix(".draft")
        with naming(draft), open(draft, "w", encoding="utf-8") as text:
            json.dump(self._sizes, text)
            text.flush()
            os.fsync(text.fileno())
        draft.replace(own)

    def forget(self) -> None:
        """The folder is done."""
        own = self._folder / self._NAME
        own.unlink(missing_ok=True)
        own.with_suffix(".draft").unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file: those of writes to an open one do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def map_shard(
    path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """Make a safetensors file of its final size; its tensors are mapped and can be written.

    What is written goes to the file and not to memory of this process.

    Args:
        path: of a new file.
        entries: name -> dtype and shape.

    Returns:
        Name -> tensor over the file.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # The widest first, so that every tensor starts at a multiple of its elements' size
    order = sorted(entries, key=lambda name: -entries[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in order:
        dtype, shape = entries[name]
        places[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [places[name], end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    start = 8 + len(raw)
    with naming(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        if end:
            os.posix_fallocate(file.fileno(), start, end)  # a full disk shows here
    whole = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)
    tensors = {}
    for name, place in places.items():
        dtype, shape = entries[name]
        nbytes = math.prod(shape) * dtype.itemsize
        tensors[name] = whole[start + place : start + place + nbytes].view(dtype).view(shape)
    return tensors


def check_manifest(folder: Path) -> None:
    """That every file of a folder that moeq wrote is there, and as long as it was.

    Raises:
        CheckpointError: a file is missing or has another size.
    """
    if not (folder / MANIFEST_NAME).exists():
        return
    for name, (size, _) in _manifest(folder).items():
        if name.endswith(".safetensors"):
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise CheckpointError(
                    f"{folder / name}: {found} bytes, expected {size}"
                    if found is not None
                    else f"{folder / name}: missing, though {MANIFEST_NAME} lists it",
                    hint="the copy is incomplete; copy it again",
                )


def check_sums(folder: Path) -> None:
    """That every byte of a folder that moeq wrote is the one that was written.

    Raises:
        CheckpointError: no manifest, a file too few or too many, or another size or SHA-256 sum.
    """
    entries = _manifest(folder)
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    if found != entries.keys():
        name = min(found ^ entries.keys())
        raise CheckpointError(f"{folder / name}: in the folder or its manifest, but not in both")
    # Weights are in several files; hashing gives up Python's lock
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = pool.map(lambda name: _sha256(folder / name), entries)
        for (name, (_, expected)), digest in zip(entries.items(), sums):
            if digest != expected:
                raise CheckpointError(
                    f"{folder / name}: its SHA-256 sum is not the one in {MANIFEST_NAME}"
                )


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Of every file: bytes and SHA-256 sum."""
    path = folder / MANIFEST_NAME
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest of moeq ({error!r})") from None


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _finish(folder: Path) -> None:
    """Modes by umask, a manifest, and everything on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        path.chmod(0o666 & ~umask)
        with naming(path), open(path, "rb") as handle:
            os.fsync(handle.fileno())
        name = path.relative_to(folder).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST_NAME
    with naming(manifest), open(manifest, "w", encoding="utf-8") as text:
        json.dump({"files": entries}, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
