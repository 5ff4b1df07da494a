"""Quantized models that were made before: `moeq.load(..., cache=True)`.

An entry is a folder as `moeq.save` writes it. Its name ends in a hash of everything that decides
its bytes: the identity of the source files, their configs, the recipe, the versions of moeq and
transformers. Every byte is held against the entry's own SHA-256 sums before it is used; an entry
that differs is set aside and made anew. Who makes or reads one holds its lock, and others wait.
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

_ENTRY = re.compile(rf"[A-Za-z0-9._-]*\.[0-9a-f]{{16}}({re.escape(_ASIDE)})?")
"""What `entry_name` makes and `set_aside`: MOEQ_CACHE can be a folder that holds more."""


@dataclass(frozen=True)
class Entry:
    """One quantized model.

    Attributes:
        name: model and hash.
        nbytes: on the disk.
        modified: when it was made, in seconds since 1970.
        is_damaged: whether it was set aside, and only waits to be cleared.
    """

    name: str
    nbytes: int
    modified: float
    is_damaged: bool


def cache_folder() -> Path:
    """MOEQ_CACHE, or moeq in the user's cache folder.

    Raises:
        CheckpointError: nobody knows where the home folder is that one of them lies in.
    """
    try:
        if found := os.environ.get("MOEQ_CACHE"):
            return Path(found).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "moeq"
    except RuntimeError as error:
        raise CheckpointError(
            f"no folder for a cache: {error}", hint="MOEQ_CACHE names another folder"
        ) from None


def identity(source: Path, recipe: Mapping[str, object]) -> str:
    """A hash of everything that decides the bytes of a quantized model.

    Args:
        source: the folder that it is read from.
        recipe: the quantization config, and what else decides the result; JSON.
    """
    stamps = []
    for file in checkpoint_files(source):
        found = file.stat()
        stamp = FileStamp.of(found)
        # Archives can give all their files one mtime, and weights of one model all have one size
        stamps.append([file.name, stamp.size, stamp.mtime_ns, stamp.inode, found.st_ctime_ns])
    configs = (source / name for name in ("config.json", "generation_config.json"))
    decides = {
        "files": stamps,
        "configs": [
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in configs
        ],
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
    except CheckpointError as error:
        aside = set_aside(entry)
        warnings.warn(f"{error.message}; kept as {aside.name}, and made again", stacklevel=4)
        return False
    return True


def set_aside(entry: Path) -> Path:
    """Keep an entry from being used again; the last that was set aside stays to be looked at."""
    aside = entry.with_name(entry.name + _ASIDE)
    with _explaining(entry.parent):
        _remove(aside)
        entry.rename(aside)
    return aside


@contextlib.contextmanager
def making(entry: Path) -> Iterator[None]:
    """Alone with an entry: others that would make it wait. What a killed one left is removed.

    Raises:
        CheckpointError: the cache folder cannot be written.
    """
    with _explaining(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_of(entry))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(
                f"waiting for another process, which makes or reads {entry.name}", stacklevel=4
            )
            lock.acquire()
    try:
        with _explaining(entry.parent):
            _remove_leftovers(entry.name)
        yield
    finally:
        lock.release()


def entries() -> list[Entry]:
    """What is in the cache, by name.

    Raises:
        CheckpointError: the cache folder cannot be read.
    """
    folder = cache_folder()
    found = []
    with _explaining(folder):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in paths if _ENTRY.fullmatch(path.name) and path.is_dir()]
    for path in paths:
        if not path.is_symlink():
            with _explaining(folder), contextlib.suppress(FileNotFoundError):  # gone meanwhile
                nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                damaged = path.name.endswith(_ASIDE)
                found.append(Entry(path.name, nbytes, path.stat().st_mtime, damaged))
    return found


def clear(names: list[str]) -> list[Entry]:
    """Remove entries, all where no name is given, and what crashes left over.

    Returns:
        What was removed. Entries that somebody is making stay.

    Raises:
        CheckpointError: no entry has such a name, or the cache folder cannot be written.
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
        with contextlib.suppress(Timeout), _explaining(cache_folder()), lock:
            if not path.is_dir():  # another clear was faster
                continue
            # Renamed first: nobody is to open half of it
            gone = path.with_name(f".{entry.name}.removed")
            _remove(gone)  # of a clear that was killed
            path.rename(gone)
            _remove(gone)
            removed.append(entry)
    if not names:
        _sweep()
    return removed


def _sweep() -> None:
    """Remove what was never finished, and locks that nobody holds."""
    folder = cache_folder()
    for lock in folder.glob(".*.lock") if folder.is_dir() else ():
        name = lock.name.removeprefix(".").removesuffix(".lock")
        if not _ENTRY.fullmatch(name):
            continue
        held = FileLock(lock, timeout=0)
        with contextlib.suppress(Timeout), _explaining(folder), held:
            _remove_leftovers(name)
            lock.unlink()


def _remove_leftovers(name: str) -> None:
    """Of an entry whose lock is held."""
    folder = cache_folder()
    for rest in (*folder.glob(f".{name}.*.partial"), *folder.glob(f".{name}*.removed")):
        _remove(rest)


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Errors of the system in the cache folder."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        place = error.filename or folder
        raise CheckpointError(
            f"{place}: {error.strerror or error}", hint="MOEQ_CACHE names another folder"
        ) from error
