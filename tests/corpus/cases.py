"""Bad checkpoints, one per number of the list of bad inputs, made from a tiny good one.

    1-25    a shard that is no safetensors file, or whose header lies
    26-47   a folder whose files, tensors or numbers do not belong together
    48-54   a config.json that describes no model, or another one

Every case damages a copy of a good folder and says what the user must be told. A case that is no
error by design is not in this table; `test_corpus` has a test of its own for each.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.checkpoint.raw import Header, entry, write, write_index
from tests.engines.tools import EXPERT_WEIGHT, EXPERTS, QWEN, amend, rewrite

FIRST, SHARD = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
"""Files of the good checkpoint in two; the second holds layer 0."""

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
NORM = "model.norm.weight"
"""In the first shard."""

Tensors = dict[str, Tensor]


def make_whole(folder: Path) -> None:
    """A good checkpoint in one file, with a tokenizer."""
    QWEN.make().to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"?": 0, "once": 1, "x": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


def make_shards(folder: Path) -> None:
    """The same in two files and an index."""
    make_whole(folder)
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    weight_map = {name: SHARD if ".layers.0." in name else FIRST for name in tensors}
    for shard in (FIRST, SHARD):
        mine = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    write_index(folder, weight_map)


@dataclass(frozen=True)
class Case:
    """One bad checkpoint.

    Attributes:
        number: in the list.
        name: in a few words.
        damage: what is done to a copy of a good folder.
        says: parts of what is printed: file, tensor, found, expected, and the way out.
        in_shards: whether the good folder has two shards; else it has one file.
        from_headers: whether it can be known before anything is allocated, and so by `plan`.
    """

    number: int
    name: str
    damage: Callable[[Path], Any]
    says: tuple[str, ...]
    in_shards: bool = True
    from_headers: bool = True

    def __str__(self) -> str:
        return f"{self.number:02} {self.name}"


# Hands to damage with


def content(data: bytes) -> Callable[[Path], Any]:
    """A shard that holds these bytes."""
    return lambda folder: (folder / SHARD).write_bytes(data)


def cut(count: int) -> Callable[[Path], Any]:
    """A shard that lost its last bytes."""
    return lambda folder: os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - count)


def header(change: Callable[[Header], Any]) -> Callable[[Path], Any]:
    """A shard with another header before the same data."""

    def damage(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        write(folder / SHARD, entries, raw[8 + length :])

    return damage


def tensor(**values: Any) -> Callable[[Path], Any]:
    """A shard whose header says something else of one tensor."""
    return header(lambda entries: entries[EXPERT_WEIGHT].update(values))


def renamed(name: str) -> Callable[[Path], Any]:
    """A shard in which one tensor has another name."""
    return header(lambda entries: entries.update({name: entries.pop(EXPERT_WEIGHT)}))


def moved(by: int) -> Callable[[Header], None]:
    """Bytes from which on and up to where a tensor lies."""

    def change(entries: Header) -> None:
        begin, end = entries[EXPERT_WEIGHT]["data_offsets"]
        entries[EXPERT_WEIGHT]["data_offsets"] = [begin + by, end + by]

    return change


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], Any]:
    """A file of other tensors."""
    return lambda folder: rewrite(folder, change)


def weight(change: Callable[[Tensor], Tensor]) -> Callable[[Path], Any]:
    """A file in which one expert's projection is another tensor."""
    return tensors(lambda found: found.update({EXPERT_WEIGHT: change(found[EXPERT_WEIGHT])}))


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    """Another index of the same shards."""

    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(folder, weight_map)

    return damage


def pipe(name: str) -> Callable[[Path], Any]:
    """A file that never ends, and blocks whoever opens it."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def config(**entries: Any) -> Callable[[Path], Any]:
    return lambda folder: amend(folder, entries)


def config_text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(text)


# Damage that takes more than one of them


def _huge_header(folder: Path) -> None:
    with open(folder / SHARD, "wb") as file:
        file.write(struct.pack("<Q", (100 << 20) + 1))
        file.truncate(200 << 20)  # takes no room on disk


def _deep(folder: Path) -> None:
    write(folder / SHARD, b"[" * 100_000 + b"]" * 100_000)


def _twice(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8 : 8 + length])
    again = json.dumps({EXPERT_WEIGHT: found[EXPERT_WEIGHT]}).encode()
    write(folder / SHARD, raw[8 : 8 + length].rstrip()[:-1] + b"," + again[1:], raw[8 + length :])


def _empty_but_huge(entries: Header) -> None:
    end = max(found["data_offsets"][1] for name, found in entries.items() if name[0] != "_")
    entries["huge"] = entry("U8", [0, 1 << 62], end, end)


def _folder_for_a_file(folder: Path) -> None:
    (folder / WHOLE).unlink()
    (folder / WHOLE).mkdir()


def _outside(folder: Path) -> Path:
    """The shard, now beside the folder that it belongs in."""
    outside = folder.parent / f"outside-{SHARD}"
    (folder / SHARD).rename(outside)
    return outside


def _linked(folder: Path) -> None:
    (folder / SHARD).symlink_to(_outside(folder))


def _listed_as(shard: Callable[[Path], str]) -> Callable[[Path], Any]:
    """An index that lists a shard that lies outside."""

    def damage(folder: Path) -> None:
        name = shard(_outside(folder))
        index(lambda found: found.update({n: name for n in found if found[n] == SHARD}))(folder)

    return damage


def _in_two(folder: Path) -> None:
    found = load_file(folder / FIRST)
    found[EXPERT_WEIGHT] = torch.ones(24, 32, dtype=torch.bfloat16)
    save_file(found, folder / FIRST, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    found = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    torch.save(found, folder / "pytorch_model.bin")


def _not_finite(found: Tensor) -> Tensor:
    found[7, 5] = float("nan")
    found[9, 1] = float("-inf")
    return found


def _too_large(found: Tensor) -> Tensor:
    """As fp32 it is a number, as bf16 it is not; and 127 / 127 of it is not even that in fp32."""
    found = found.float()
    found[7, 5] = torch.finfo(torch.float32).max
    return found


_GET_AGAIN = "get it again"
_RANGE = f"{EXPERT_WEIGHT!r} has impossible"
_FUSED = torch.zeros(4, 48, 32, dtype=torch.bfloat16)

CASES = (
    Case(1, "empty", content(b""), (SHARD, "0 bytes", _GET_AGAIN)),
    Case(2, "under 8 bytes", content(bytes(7)), (SHARD, "7 bytes", _GET_AGAIN)),
    Case(
        3,
        "header of 2^63 bytes",
        content(struct.pack("<Q", 1 << 63) + b"{}"),
        (SHARD, f"header of {1 << 63} bytes in a file of 10", _GET_AGAIN),
    ),
    Case(4, "header above 100 MB", _huge_header, (SHARD, "header of 104857601 bytes", _GET_AGAIN)),
    Case(
        5,
        "header past the end",
        content(struct.pack("<Q", 99) + b"{" * 98),
        (SHARD, "header of 99 bytes in a file of 106", _GET_AGAIN),
    ),
    Case(
        6,
        "header is not UTF-8",
        lambda folder: write(folder / SHARD, b'"\xff"'),
        (SHARD, "header is not JSON", "utf-8", _GET_AGAIN),
    ),
    Case(
        7,
        "header is not JSON",
        lambda folder: write(folder / SHARD, b"{{{{"),
        (SHARD, "header is not JSON", _GET_AGAIN),
    ),
    Case(
        7,
        "NaN in a header",
        tensor(x=float("nan")),
        (SHARD, "header is not JSON", "NaN", _GET_AGAIN),
    ),
    Case(8, "header 100,000 deep", _deep, (SHARD, "header is not JSON", _GET_AGAIN)),
    Case(9, "cut off", cut(100), (SHARD, "tensors end at byte", "the file at", _GET_AGAIN)),
    Case(
        10,
        "bytes after the end",
        lambda folder: content((folder / SHARD).read_bytes() + b"\0")(folder),
        (SHARD, "tensors end at byte", "the file at", _GET_AGAIN),
    ),
    Case(
        11, "overlap", header(moved(-64)), (SHARD, EXPERT_WEIGHT, "overlap or leave a", _GET_AGAIN)
    ),
    Case(12, "hole", header(moved(64)), (SHARD, EXPERT_WEIGHT, "overlap or leave a", _GET_AGAIN)),
    Case(13, "negative sizes", tensor(shape=[-24, -32]), (SHARD, _RANGE, "-24", _GET_AGAIN)),
    Case(
        13,
        "negative offsets",
        tensor(data_offsets=[-1536, 0]),
        (SHARD, _RANGE, "-1536", _GET_AGAIN),
    ),
    Case(
        14,
        "size above 2^64",
        tensor(shape=[1 << 40, 1 << 40]),
        (SHARD, EXPERT_WEIGHT, "takes 1536 bytes", f"needs {1 << 81}", _GET_AGAIN),
    ),
    Case(
        15,
        "shape and bytes disagree",
        tensor(shape=[24, 31]),
        (SHARD, EXPERT_WEIGHT, "takes 1536 bytes", "[24, 31] needs 1488", _GET_AGAIN),
    ),
    Case(
        16,
        "unknown dtype",
        tensor(dtype="F4_E2M1"),
        (SHARD, EXPERT_WEIGHT, "'F4_E2M1'", "moeq reads BF16"),
    ),
    Case(
        17,
        "metadata that is no text",
        header(lambda entries: entries.update(__metadata__={"format": 7})),
        (SHARD, "__metadata__", "text", _GET_AGAIN),
    ),
    Case(
        18,
        "HTML page",
        content(b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"),
        (SHARD, "an HTML page", "download"),
    ),
    Case(
        19,
        "git-lfs pointer",
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"),
        (SHARD, "a git-lfs pointer", "git lfs pull"),
    ),
    Case(
        20, "folder for a file", _folder_for_a_file, (WHOLE, "not a regular file"), in_shards=False
    ),
    Case(20, "pipe for a file", pipe(SHARD), (SHARD, "not a regular file")),
    Case(20, "pipe for an index", pipe(INDEX), (INDEX, "not a regular file")),
    Case(21, "name twice", _twice, (SHARD, EXPERT_WEIGHT, "twice", _GET_AGAIN)),
    Case(22, "empty name", renamed(""), (SHARD, "name '' is empty", _GET_AGAIN)),
    Case(23, "NUL in a name", renamed("a\0b"), (SHARD, r"'a\x00b'", "control", _GET_AGAIN)),
    Case(23, "path for a name", renamed("../../a"), (SHARD, "'../../a'", "path", _GET_AGAIN)),
    Case(
        23,
        "endless number in a name",
        renamed(EXPERT_WEIGHT.replace(".3.", f".{'3' * 5000}.")),
        (SHARD, "model.layers.0.mlp.experts.333", "5044 characters", _GET_AGAIN),
    ),
    Case(24, "escape in a name", renamed("a\x1b[2J"), (SHARD, r"'a\x1b[2J'", "control")),
    Case(
        24,
        "line end in a shard's name",
        index(lambda found: found.update({EXPERT_WEIGHT: "a\nhint: b.safetensors"})),
        (r"a\nhint: b.safetensors: missing", INDEX),
    ),
    Case(25, "0 x 2^62", header(_empty_but_huge), (SHARD, "'huge' has impossible", str(1 << 62))),
    Case(
        26,
        "shard is missing",
        lambda folder: (folder / SHARD).unlink(),
        (SHARD, "missing", INDEX, "download the checkpoint again"),
    ),
    Case(
        27,
        "shards without an index",
        lambda folder: (folder / INDEX).unlink(),
        (FIRST, f"without {INDEX}", "download"),
    ),
    Case(
        28,
        "index without its keys",
        lambda folder: (folder / INDEX).write_text('{"metadata": {}}'),
        (INDEX, "weight_map", "download"),
    ),
    Case(
        28,
        "index whose metadata is null",
        lambda folder: (folder / INDEX).write_text(
            json.dumps(json.loads((folder / INDEX).read_text()) | {"metadata": None})
        ),
        (INDEX, "metadata", "download"),
    ),
    Case(
        29,
        "index leads up",
        _listed_as(lambda outside: f"../{outside.name}"),
        (INDEX, f"'../outside-{SHARD}'", "not a file name of this folder"),
    ),
    Case(
        30,
        "index leads elsewhere",
        _listed_as(str),
        (INDEX, f"outside-{SHARD}'", "not a file name of this folder"),
    ),
    Case(31, "link leads outside", _linked, (SHARD, f"outside-{SHARD}", "outside of", "copy")),
    Case(
        32,
        "index names the wrong shard",
        index(lambda found: found.update({EXPERT_WEIGHT: FIRST})),
        (INDEX, EXPERT_WEIGHT, f"is in {FIRST}, found in {SHARD}", "download"),
    ),
    Case(33, "tensor in two shards", _in_two, (SHARD, EXPERT_WEIGHT, f"also in {FIRST}", "again")),
    Case(
        34,
        "expert is missing",
        tensors(lambda found: found.pop(EXPERT_WEIGHT)),
        (EXPERTS, f"missing from the checkpoint: {EXPERT_WEIGHT}", "incomplete", "config.json"),
        in_shards=False,
    ),
    Case(
        35,
        "unknown tensor",
        tensors(lambda found: found.update({"model.layers.0.extra.weight": torch.ones(3)})),
        (WHOLE, "'model.layers.0.extra.weight'", "Qwen2MoeForCausalLM", "config.json"),
        in_shards=False,
    ),
    Case(
        35,
        "layer beyond the model's",
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        (WHOLE, "'model.layers.1.", "config.json"),
        in_shards=False,
    ),
    Case(
        36,
        "wrong shape",
        weight(lambda found: found[:-1].contiguous()),
        (WHOLE, EXPERT_WEIGHT, "[23, 32]", "expected [24, 32]", "config.json"),
        in_shards=False,
    ),
    Case(
        36,
        "wrong shape of what is kept",
        tensors(lambda found: found.update({NORM: torch.ones(31, dtype=torch.bfloat16)})),
        (WHOLE, NORM, "[31]", "expected [32]", "config.json"),
        in_shards=False,
    ),
    Case(
        37,
        "int8 for bf16",
        weight(lambda found: found.to(torch.int8)),
        (WHOLE, EXPERT_WEIGHT, "int8", "expected bfloat16", "already quantized"),
        in_shards=False,
    ),
    Case(
        38,
        "NaN and Inf",
        weight(_not_finite),
        (WHOLE, EXPERT_WEIGHT, "nan at [7, 5]", "2 of 768", _GET_AGAIN),
        in_shards=False,
        from_headers=False,
    ),
    Case(
        41,
        "scale overflows",
        weight(_too_large),
        (WHOLE, EXPERT_WEIGHT, "3.4028234", "at [7, 5]", "1 of 768", _GET_AGAIN),
        in_shards=False,
        from_headers=False,
    ),
    Case(
        43,
        "already quantized",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("config.json", "already quantized (gptq)", "unquantized"),
    ),
    Case(
        44, "pickle only", _pickled, ("pytorch_model.bin", "pickle", "safetensors"), in_shards=False
    ),
    Case(
        45,
        "experts fused and apart",
        tensors(lambda found: found.update({f"{EXPERTS}.gate_up_proj": _FUSED})),
        (WHOLE, f"{EXPERTS}.gate_up_proj", "second gate", "twice"),
        in_shards=False,
    ),
    Case(48, "config is no JSON", config_text("{"), ("config.json", "not the config", "download")),
    Case(48, "config is empty", config_text(""), ("config.json", "not the config")),
    Case(48, "config is a number", config_text("7"), ("config.json", "not the config")),
    Case(48, "config of nothing", config_text('{"hidden_size": 8}'), ("config.json", "model_type")),
    Case(48, "config 100,000 deep", config_text("[" * 100_000), ("config.json", "not the config")),
    Case(48, "config is a list", config_text("[]"), ("config.json", "not the config")),
    Case(49, "size is text", config(hidden_size="wide"), ("config.json", "hidden_size")),
    Case(49, "size is null", config(hidden_size=None), ("config.json", "hidden_size")),
    Case(49, "model type is a list", config(model_type=["x"]), ("config.json", "not the config")),
    Case(49, "dtype is none", config(dtype="bfloat17"), ("config.json", "bfloat17")),
    Case(49, "dtype is a number", config(dtype=16), ("config.json", "dtype is 16")),
    Case(49, "top-k is text", config(num_experts_per_tok="two"), ("config.json", "num_experts")),
    Case(49, "activation is none", config(hidden_act="sill"), ("config.json", "sill")),
    Case(
        50,
        "more experts than there are",
        config(num_experts=5),
        (SHARD, "layers.0.mlp.gate.weight", "[4, 32]", "expected [5, 32]", "config.json"),
    ),
    Case(
        50,
        "fewer experts",
        config(num_experts=3),
        (SHARD, "layers.0.mlp.gate.weight", "[4, 32]", "expected [3, 32]", "config.json"),
    ),
    Case(50, "no experts", config(num_experts=0), ("Qwen2MoeForCausalLM", "no experts")),
    Case(51, "top-k above experts", config(num_experts_per_tok=9), ("config.json", "is 9", "4")),
    Case(
        52,
        "more layers than weights",
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ("missing from the checkpoint", "layers.2.", "config.json"),
    ),
    Case(53, "negative size", config(hidden_size=-32), ("config.json", "-32")),
    Case(53, "huge size", config(moe_intermediate_size=1 << 62), ("config.json",)),
    Case(
        53,
        "huge number of layers",
        config(num_hidden_layers=10**9, layer_types=None),
        ("config.json", "num_hidden_layers is 1000000000", "at most 10000"),
    ),
    Case(53, "negative layers", config(num_hidden_layers=-1), ("config.json",)),
    Case(53, "no heads", config(num_attention_heads=0), ("config.json",)),
    Case(54, "unknown model", config(model_type="gpt9"), ("config.json", "'gpt9'", "newer")),
)
