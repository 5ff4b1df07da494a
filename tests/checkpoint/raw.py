"""safetensors files written by hand, so that they can also be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

Header = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(
    file: Path, header: Header | bytes, data: bytes = b"", *, length: int | None = None
) -> Path:
    """u64 length | header | data; `length` to lie about it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def write_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
