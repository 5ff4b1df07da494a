"""What commands write: files, asked for before the work and whole when they are there; names."""

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
    elif path.exists() and not path.is_file():
        found = "is there, and no file"
    elif not folder.is_dir():
        found = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        found = f"{folder} cannot be written"
    else:
        return
    raise ConfigError(f"{option} {path}: {found}", hint="name a file in an existing folder")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all; where a link leads.

    Raises:
        ConfigError: it cannot be written.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: {error.strerror}", hint="name another file") from None


def printable(text: str) -> str:
    """File and tensor names come from strangers: none of their escapes reaches a terminal, and none
    of their line ends begins a line that looks like ours."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
