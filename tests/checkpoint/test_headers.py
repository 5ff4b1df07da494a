"""What a checkpoint holds, from its headers; and every way in which those can lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeq.checkpoint.folder import checkpoint_files
from moeq.checkpoint.headers import DTYPES, FileStamp, TensorSpec, read_headers
from moeq.errors import CheckpointError
from tests.checkpoint.raw import Header, entry, write, write_index

TWO = {"a": entry("F32", [2, 1], 0, 8), "b": entry("BF16", [3], 8, 14)}


def test_headers_say_what_each_tensor_is_and_where(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **TWO}
    file = write(tmp_path / "m.safetensors", header, bytes(14))
    start = 8 + len(json.dumps(header))
    stamp = FileStamp.of(file.stat())
    assert stamp.size == start + 14
    assert read_headers([file]) == {
        "a": TensorSpec("a", torch.float32, (2, 1), file, start, 8, stamp),
        "b": TensorSpec("b", torch.bfloat16, (3,), file, start + 8, 6, stamp),
    }


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(2, 3).to(dtype) for name, dtype in DTYPES.items() if name != "BOOL"
    }
    tensors |= {"BOOL": torch.zeros(2, 3, dtype=torch.bool), "scalar": torch.tensor(1.0)}
    tensors["empty"] = torch.zeros(0, 5)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    specs = read_headers([file])
    assert specs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        spec = specs[name]
        assert (spec.dtype, spec.shape, spec.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    assert read_headers([write(tmp_path / "m.safetensors", {})]) == {}


def test_padding_after_the_header_and_any_order_of_entries_are_fine(tmp_path: Path) -> None:
    header = json.dumps({"b": TWO["b"], "a": TWO["a"]}).encode() + b"   "
    specs = read_headers([write(tmp_path / "m.safetensors", header, bytes(14))])
    assert {name: spec.offset for name, spec in specs.items()} == {
        "a": 8 + len(header),
        "b": 16 + len(header),
    }


NAMES_IN_MESSAGES: list[tuple[str, Header, int, str]] = [
    # what is wrong, header, bytes of data, message beside the file's name
    ("same bytes", {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4, "'a' and 'b'"),
    ("hole in front", {"a": entry("U8", [4], 2, 6)}, 6, "the header and 'a' overlap or"),
    ("offsets reversed", {"a": entry("U8", [4], 4, 0)}, 4, "'a' takes -4 bytes"),
    ("offsets too far apart", {"a": entry("U8", [4], 0, 5)}, 5, "'a' takes 5 bytes"),
    ("fractional size", {"a": entry("U8", [4.0], 0, 4)}, 4, "'a' has impossible shape"),  # type: ignore[list-item]
    ("boolean size", {"a": entry("U8", [True], 0, 1)}, 1, "'a' has impossible shape"),
    ("shape a number", {"a": entry("U8", 4, 0, 4)}, 4, "'a' has impossible shape"),  # type: ignore[arg-type]
    ("offsets as text", {"a": entry("U8", [4], "0", "4")}, 4, "'a' has impossible"),  # type: ignore[arg-type]
    ("dtype a list", {"a": entry(["U8"], [4], 0, 4)}, 4, r"'a' has dtype \['U8'\]"),  # type: ignore[arg-type]
    ("dtype missing", {"a": {"shape": [4], "data_offsets": [0, 4]}}, 4, "'a' is malformed"),
    ("three offsets", {"a": entry("U8", [4], 0, 4) | {"data_offsets": [0, 2, 4]}}, 4, "'a' is mal"),
    ("entry a list", {"a": [1, 2]}, 4, "'a' is malformed"),
    ("entry null", {"a": None}, 4, "'a' is malformed"),
    ("newline in a name", {"a\nb": entry("U8", [4], 0, 4)}, 4, r"'a\\nb' is empty or holds"),
    ("half a character", {"a\ud800": entry("U8", [4], 0, 4)}, 4, r"'a\\ud800' is empty or"),
    ("no tensors but data", {}, 1, "tensors end at byte"),
]


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [case[1:] for case in NAMES_IN_MESSAGES],
    ids=[case[0] for case in NAMES_IN_MESSAGES],
)
def test_headers_that_lie_are_refused(
    header: Header, size: int, message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model-00007.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=rf"model-00007\.safetensors: .*{message}"):
        read_headers([file])


BROKEN: list[tuple[str, bytes, str]] = [
    ("no header", struct.pack("<Q", 2), "header of 2 bytes in a file of 8"),
    ("a zip", b"PK\x03\x04" + bytes(60), "not safetensors, or cut off"),
    ("length zero", struct.pack("<Q", 0) + bytes(5), "header is not JSON"),
    ("a list", struct.pack("<Q", 2) + b"[]", "header is not a JSON object"),
    ("a number", struct.pack("<Q", 1) + b"7", "header is not a JSON object"),
]


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_files_that_are_no_safetensors_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "shard.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"shard\.safetensors: .*{message}"):
        read_headers([file])


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: No such file"):
        read_headers([tmp_path / "gone.safetensors"])
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors: not a regular file"):
        read_headers([tmp_path / "folder.safetensors"])


def shards(folder: Path) -> list[Path]:
    """A model folder of two shards: "a" in the first, "b" in the second."""
    (folder / "config.json").write_text("{}")
    one = write(folder / "one.safetensors", {"a": entry("U8", [4], 0, 4)}, bytes(4))
    two = write(folder / "two.safetensors", {"b": entry("U8", [4], 0, 4)}, bytes(4))
    return [one, two]


def test_shards_are_read_together(tmp_path: Path) -> None:
    files = shards(tmp_path)
    write_index(tmp_path, {"b": "two.safetensors", "a": "one.safetensors"})
    assert checkpoint_files(tmp_path) == files
    specs = read_headers(files)
    assert {name: spec.file for name, spec in specs.items()} == {"a": files[0], "b": files[1]}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
            r"index\.json: lists tensor 'c', which no shard holds \(expected in two\.safetensors",
        ),
        (
            {"a": "two.safetensors", "b": "two.safetensors"},
            r"index\.json: says 'a' is in two\.safetensors, found in one\.safetensors",
        ),
        ({"a": "one.safetensors"}, r"two\.safetensors: tensor 'b' is not in model\.safetensors\.i"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(
    weight_map: dict[str, str], message: str, tmp_path: Path
) -> None:
    files = shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_headers(files)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": null}',
        "\x00",
        '{"weight_map": {}}',
        "[" * 100_000,
    ],
    ids=lambda content: content[:30],
)
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: (not an index of shards|lists no te)"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "one.bin", "..", ""],
)
def test_shards_outside_the_folder_are_refused(shard: str, tmp_path: Path) -> None:
    shards(tmp_path)
    write_index(tmp_path, {"a": shard})
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(tmp_path)
    assert f"index.json: shard {shard!r} is not a file name of this folder" in caught.value.message


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = write(tmp_path / "model.safetensors", TWO, bytes(14))
    assert checkpoint_files(tmp_path) == [file]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.safetensors"], "no config.json"),
        (["config.json"], "no weights"),
        (["config.json", "one.safetensors"], r"shards \(one\.safetensors, \.\.\.\) without model"),
        (["config.json", "pytorch_model.bin"], r"only as pickle \(pytorch_model\.bin\), which can"),
    ],
)
def test_folders_that_are_no_checkpoint_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_files(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        checkpoint_files(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file: Any = write(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such folder"):
        checkpoint_files(file)
