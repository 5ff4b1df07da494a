"""What `moeq eval --json` prints, as its readers see it."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def dig(row: Result, path: str) -> Any:
    """The value at a path of keys with dots between; None where a part of it is missing."""
    value: Any = row
    for key in path.split("."):
        value = None if value is None else value.get(key)
    return value
