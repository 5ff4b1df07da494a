"""Which files of a folder are its weights: one, or the shards of an index; none outside of it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from moeq.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

VARIANT = "moeq"
"""How transformers calls files of weights that it should not take by itself."""

QUANTIZED_INDEX = f"model.safetensors.index.{VARIANT}.json"
QUANTIZED_SINGLE = f"model.{VARIANT}.safetensors"

DOWNLOAD = "download the checkpoint again; it is incomplete, or mixed with another"


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
            return [regular(folder / single)]
        index = folder / index_name
        if index.exists():
            return _listed(index)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise CheckpointError(
            f"{folder}: shards ({found[0]}, ...) without {INDEX_NAME}", hint=DOWNLOAD
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
    shards = sorted(set(weight_map_of(index).values()))
    for shard in shards:
        _check_shard_name(shard, index)
        if not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / shard}: missing, though {index.name} lists it",
                hint="download the checkpoint again; the first one was interrupted",
            )
    return [regular(folder / shard) for shard in shards]


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


def regular(file: Path) -> Path:
    """The file, which a folder, pipe or device is not: those can block whoever opens them.

    Raises:
        CheckpointError: it is one.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise CheckpointError(
            f"{file}: not a regular file", hint="a folder, pipe or device is there; get the file"
        )
    return file


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor -> shard, as an index says.

    Raises:
        CheckpointError: it does not.
    """
    try:
        entries = json.loads(regular(index).read_text(encoding="utf-8"))
        weight_map = entries["weight_map"]
        if not isinstance(entries["metadata"], dict):  # transformers reads and changes it
            raise TypeError("metadata that is no object")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard whose name is not text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({error!r})", hint=DOWNLOAD
        ) from None
    if not weight_map:
        raise CheckpointError(f"{index}: lists no tensors", hint=DOWNLOAD)
    return dict(weight_map)


def _check_shard_name(shard: str, index: Path) -> None:
    if Path(shard).name != shard or not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: shard {shard!r} is not a file name of this folder",
            hint="a checkpoint's shards lie beside its index, as *.safetensors",
        )
