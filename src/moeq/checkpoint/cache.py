"""Quantized models that were made before: `moeq.load(..., cache=True)`.

An entry is a folder as `moeq.save` writes it. Its name ends in a hash of everything that decides
its bytes: the identity of the source files, config.json, the recipe, the versions of moeq and
transformers. Every byte is held against the entry's own SHA-256 sums before it is used; an entry
that differs is set aside and made anew. Who makes an entry holds its lock, and others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import FileStamp
from moeq.checkpoint.writer import check_sums
from moeq.errors import CheckpointError

_ASIDE = ".damaged"


@dataclass(frozen=True)
class Entry:
    """One quantized model.

    Attributes:
        name: model, scheme and hash.
        nbytes: on the disk.
        modified: when it was made, in seconds since 1970.
        is_damaged: whether it was set aside, and only waits to be cleared.
    """

    name: str
    nbytes: int
    modified: float
    is_damaged: bool


def cache_folder() -> Path:
    """MOEQ_CACHE, or moeq in the user's cache folder."""
    if found := os.environ.get("MOEQ_CACHE"):
        return Path(found).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moeq"


def identity(source: Path, recipe: Mapping[str, object]) -> str:
    """A hash of everything that decides the bytes of a quantized model.

    Args:
        source: the folder that it is read from.
        recipe: the quantization config, and what else decides the result; JSON.
    """
    stamps = []
    for file in checkpoint_files(source):
        stamp = FileStamp.of(file.stat())
        stamps.append([file.name, stamp.size, stamp.mtime_ns, stamp.inode])
    decides = {
        "files": stamps,
        "config": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
        "recipe": recipe,
        "versions": {name: version(name) for name in ("moeq", "transformers")},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def entry_name(source: Path, recipe: Mapping[str, object]) -> str:
    """What the entry of a model is called; see `identity`."""
    path = source.resolve()
    # The hub's own folders are models--owner--name/snapshots/<commit>
    of_hub = [part for part in path.parts if part.startswith("models--")]
    label = of_hub[-1].removeprefix("models--") if of_hub else path.name
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)[:80]}.{identity(source, recipe)}"


def intact(entry: Path) -> bool:
    """Whether an entry is there, byte for byte as it was made; one that is not is set aside."""
    if not entry.is_dir():
        return False
    try:
        check_sums(entry)
    except CheckpointError:
        set_aside(entry)
        return False
    return True


def set_aside(entry: Path) -> Path:
    """Keep an entry from being used again; the last that was set aside stays to be looked at."""
    aside = entry.with_name(entry.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    entry.rename(aside)
    return aside


@contextlib.contextmanager
def making(entry: Path) -> Iterator[None]:
    """Alone with an entry: others that would make it wait.

    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_of(entry))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"waiting for another process, which makes {entry.name}", stacklevel=4)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"{entry.parent}: {error.strerror}", hint="MOEQ_CACHE names another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def entries() -> list[Entry]:
    """What is in the cache, by name."""
    folder = cache_folder()
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            damaged = path.name.endswith(_ASIDE)
            found.append(Entry(path.name, nbytes, path.stat().st_mtime, damaged))
    return found


def clear(names: list[str]) -> list[Entry]:
    """Remove entries, all where no name is given, and what crashes left over.

    Returns:
        What was removed. Entries that somebody is making stay.

    Raises:
        CheckpointError: no entry has such a name.
    """
    every = entries()
    for name in names:
        if name not in {entry.name for entry in every}:
            raise CheckpointError(
                f"{name}: no such entry in {cache_folder()}", hint="`moeq cache list` names them"
            )
    removed = []
    for entry in every:
        if names and entry.name not in names:
            continue
        path = cache_folder() / entry.name
        lock = FileLock(_lock_of(path.with_name(entry.name.removesuffix(_ASIDE))), timeout=0)
        with contextlib.suppress(Timeout), lock:
            # Renamed first: nobody is to open half of it
            gone = path.with_name(f".{entry.name}.removed")
            path.rename(gone)
            shutil.rmtree(gone)
            removed.append(entry)
    if not names:
        _sweep()
    return removed


def _sweep() -> None:
    """Remove what was never finished, and locks that nobody holds."""
    folder = cache_folder()
    for lock in folder.glob(".*.lock") if folder.is_dir() else ():
        held = FileLock(lock, timeout=0)
        with contextlib.suppress(Timeout), held:
            name = lock.name.removeprefix(".").removesuffix(".lock")
            for rest in (*folder.glob(f".{name}.*.partial"), *folder.glob(f".{name}*.removed")):
                shutil.rmtree(rest)
            lock.unlink()


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")
