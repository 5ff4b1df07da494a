"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from moeq.checkpoint.headers import FileStamp, TensorSpec, spec_of
from moeq.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Config, weights, tokenizer. No code and no pickle."""

_FOLDERS = ["*/*"]
"""Not fetched: gpt-oss has its weights there again, in two other formats."""


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or fetched from the Hugging Face hub.

    Args:
        model: a folder, or an id such as "Qwen/Qwen3-30B-A3B", which asks for network access.
        revision: of a hub id.

    Raises:
        CheckpointError: no such folder or id, or the hub cannot be reached and nothing is cached.
    """
    name = str(model)
    try:
        folder = Path(model).expanduser()
        if folder.exists():
            return folder
    except (OSError, RuntimeError) as error:  # too long, not to be entered; ~ of nobody
        raise CheckpointError(f"{name}: {error}", hint="check the path") from None
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: no such folder, and not an id on the hub (owner/name)",
            hint="check the path",
        )
    from huggingface_hub import snapshot_download

    with _hub_errors(name):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_FILES, ignore_patterns=_FOLDERS
            )
        )


def is_hub_id(model: str | Path) -> bool:
    """Whether this can only be fetched: no folder of that name, and the form owner/name."""
    return bool(_HUB_ID.fullmatch(str(model))) and not Path(model).exists()


def remote_headers(name: str, revision: str | None = None) -> tuple[Path, dict[str, TensorSpec]]:
    """The config and headers of a model on the hub, by requests for parts of its files.

    Returns:
        A folder with its config.json, and its tensors; their `file` is a name alone.

    Raises:
        CheckpointError: no such id, no safetensors, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with _hub_errors(name):
        config = hf_hub_download(name, "config.json", revision=revision)
        try:
            found = HfApi().get_safetensors_metadata(name, revision=revision)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"{name}: no safetensors that moeq can read ({error})") from None
    specs: dict[str, TensorSpec] = {}
    for file, metadata in found.files_metadata.items():
        for tensor, info in metadata.tensors.items():
            entry = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            if tensor in specs:
                raise CheckpointError(f"{file}: tensor {tensor!r} is also in {specs[tensor].file}")
            specs[tensor], _, _ = spec_of(Path(file), tensor, entry, 0, FileStamp(0, 0, 0))
    return Path(config).parent, specs


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What can go wrong on the way to the hub, in our words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{name}: its owner gives access on request",
            hint="ask on its hub page, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder here, no such model on the hub (or it is private)",
            hint="check the spelling; `hf auth login` for a private one",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: not in the local cache, and the hub cannot be reached"
            f" ({type(error).__name__})",
            hint="connect, or pass the path of a folder",
        ) from None
