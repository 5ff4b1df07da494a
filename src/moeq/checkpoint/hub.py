"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

from moeq.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Config, weights, tokenizer. No code and no pickle."""


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or fetched from the Hugging Face hub.

    Args:
        model: a folder, or an id such as "Qwen/Qwen3-30B-A3B", which asks for network access.
        revision: of a hub id.

    Raises:
        CheckpointError: no such folder or id, or the hub cannot be reached and nothing is cached.
    """
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    name = str(model)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: no such folder, and not an id on the hub (owner/name)",
            hint="check the path",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
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
