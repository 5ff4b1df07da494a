"""Files that commands write: asked for before the work, there when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

from moeq.errors import ConfigError


def check_writable(path: Path, option: str) -> None:
    """That a file can be written there.

    Raises:
        ConfigError: naming the option that asked for it.
    """
    folder = path.parent
    if path.is_dir():
        found = "is a folder"
    elif not folder.is_dir():
        found = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        found = f"{folder} cannot be written"
    else:
        return
    raise ConfigError(f"{option} {path}: {found}", hint="name a file in an existing folder")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: {error.strerror}", hint="name another file") from None
